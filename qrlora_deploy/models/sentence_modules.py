"""How a sentence encoder pools, as sentence-transformers' files beside its weights say it."""

from pathlib import Path
from typing import Any

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.io.reading import is_file, parse_json, read_text
from qrlora_deploy.tasks.pooling import FIRST, MEAN, Pooling

MODULES = "modules.json"
MAX_BYTES = 2**20

POOLING, NORMALIZE = "Pooling", "Normalize"
KNOWN = ("Transformer", POOLING, NORMALIZE)
"""Kinds of modules, by the last part of their class; others compute what a bundle has not."""

MODES = {"cls": FIRST, "cls_token": FIRST, "mean": MEAN, "mean_tokens": MEAN}
PREFIX = "pooling_mode_"
"""Of switches that files of older versions have instead of one name, or a list of them, as `pooling_mode`."""


def read_pooling(folder: Path) -> Pooling:
    """The pooling of the encoder in `folder`: the mean, of any length, where it has no `modules.json`.

    Raises:
        FileFormatError: a file is damaged.
        InputError: there are other modules, or another pooling than the mean or the first token.
    """
    if not is_file(folder / MODULES):
        return Pooling()
    modules = _read(folder / MODULES, list)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
    others = [kind for kind in kinds if kind not in KNOWN]
    if others or len(kinds) < len(modules):
        raise InputError(
            f"{folder / MODULES}: the module {others[0] if others else 'without a type'} is not supported; embeddings "
            f"are pooled, and normalised where it says so"
        )
    places = [module.get("path", "") for module, kind in zip(modules, kinds, strict=True) if kind == POOLING]
    mode = _mode(folder, str(places[0])) if places else MEAN
    return Pooling(mode, NORMALIZE in kinds)


def _mode(folder: Path, path: str) -> str:
    if path.startswith("/") or ".." in path or "\\" in path:
        raise FileFormatError(f"{folder / MODULES}: the path {path!r} lies outside the folder")
    file = folder / path / "config.json"
    settings = _read(file, dict)
    named = settings.get("pooling_mode", [])
    found = [str(name) for name in (named if isinstance(named, list) else [named])]
    found += [key.removeprefix(PREFIX) for key, value in settings.items() if key.startswith(PREFIX) and value is True]
    modes = {MODES.get(name) for name in found}
    if len(modes) != 1 or None in modes:
        raise InputError(f"{file}: pools by {', '.join(found) or 'nothing'}; mean or cls is supported")
    return MODES[found[0]]


def _read(file: Path, kind: type) -> Any:
    value = parse_json(read_text(file, MAX_BYTES), f"{file} is not JSON")
    if not isinstance(value, kind):
        raise FileFormatError(f"{file} must hold a JSON {'list' if kind is list else 'object'}")
    return value
