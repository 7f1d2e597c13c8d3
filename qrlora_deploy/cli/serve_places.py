"""Where the models of `serve` lie, and their customers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qrlora_deploy.errors import InputError

if TYPE_CHECKING:
    from qrlora_deploy.serving.opening import ModelPlaces


def places_of(
    bundle: Path | None, models: Sequence[str], customers: Sequence[str], packed: Sequence[str], poll_s: float
) -> "list[ModelPlaces]":
    """The models of a server by their options.

    Raises:
        InputError: a name is given twice or is none, or a file or folder is not there.
    """
    from qrlora_deploy.runtime.customers.objects.places import check_url, is_url
    from qrlora_deploy.serving.opening import ModelPlaces

    folders = {} if bundle is None else {bundle.resolve().name: bundle}
    for text in models:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise InputError(f"--model {text!r:.80} must be NAME=BUNDLE")
        if name in folders:
            raise InputError(f"--model {name!r:.80} is given twice; each model needs a name of its own")
        folders[name] = Path(path)
    places = _by_name("--customers", customers, list(folders))
    urls = {name: place for name, place in places.items() if is_url(place)}
    of_folder = {name: Path(place) for name, place in places.items() if name not in urls}
    of_file = {name: Path(place) for name, place in _by_name("--packed", packed, list(folders)).items()}
    for url in urls.values():
        check_url(url)
    for option, paths in (("--customers", of_folder), ("--packed", of_file)):
        for found in paths.values():
            if not found.exists():
                raise InputError(f"{option} {found}: there is no {found}")
    return [
        ModelPlaces(name, path, of_folder.get(name), of_file.get(name), urls.get(name), poll_s)
        for name, path in folders.items()
    ]


def _by_name(option: str, values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """`[NAME=]PLACE` by the model's name, the first model's where none is given."""
    found: dict[str, str] = {}
    for value in values:
        head, equals, rest = value.partition("=")
        name, place = (head, rest) if equals and head in names else (names[0], value)
        if name in found:
            raise InputError(f"{option} is given twice for the model {name}; give it once")
        found[name] = place
    return found
