"""Find the basis and the base that a coefficients file remembers; the digests decide.

A recorded place is looked up from the coefficients file's folder and from the current folder,
then by its last part in both. A candidate with another digest is not used.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qrlora_deploy.errors import BasisMismatchError, InputError, argument
from qrlora_deploy.formats.basis import Basis, read_basis
from qrlora_deploy.formats.coefficients import Coefficients, recorded_place
from qrlora_deploy.io.reading import is_file

if TYPE_CHECKING:
    from qrlora_deploy.models.checkpoint import Checkpoint

__all__ = ["locate_base", "locate_basis", "recorded_place"]

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate_basis(coefficients: Coefficients, file: Path, given: Path | None = None) -> Basis:
    """The basis of `coefficients`, which were read from `file`.

    Args:
        coefficients: the customer.
        file: its file.
        given: a basis file the user named; then no other is looked for.

    Raises:
        BasisMismatchError: the given basis, or each that was found, has another digest.
        InputError: none was found.
    """
    if given is not None:
        basis = read_basis(given)
        _check_fits(coefficients, basis, file, given)
        return basis
    refused = []
    for candidate in _places(coefficients.basis_file, file.parent):
        if not is_file(candidate):
            continue
        try:
            basis = read_basis(candidate)
        except InputError as error:
            refused.append(str(error))
            continue
        if basis.digest == coefficients.basis_digest:
            _check_fits(coefficients, basis, file, candidate)
            return basis
        refused.append(f"{candidate} has digest {basis.digest[:12]}")
    wanted = f"{file} was trained on basis {coefficients.basis_digest[:12]} ({coefficients.basis_file or 'no name'})"
    if refused:
        raise BasisMismatchError(f"{wanted}, but {'; '.join(refused)}; give the right one with {argument('basis')}")
    raise InputError(
        f"{wanted}, which is neither beside it nor in the current folder; give it with {argument('basis')}"
    )


def _check_fits(coefficients: Coefficients, basis: Basis, file: Path, given: Path) -> None:
    if coefficients.basis_digest != basis.digest:
        raise BasisMismatchError(
            f"{file} was trained on basis {coefficients.basis_digest[:12]}, but {given} is basis "
            f"{basis.digest[:12]}; give the basis it was trained on, or train the customer again"
        )
    try:
        coefficients.check_fits(basis)
    except InputError as error:
        raise type(error)(f"{file}: {error}") from error


def locate_base(coefficients: Coefficients, file: Path, given: str | None = None) -> "Checkpoint":
    """The base that `coefficients`, read from `file`, were trained on.

    Args:
        coefficients: the customer.
        file: its file.
        given: folder or hub name the user gave; then no other is looked for.

    Raises:
        BasisMismatchError: the given base, or each that was found, holds other weights.
        InputError: none was found.
    """
    # Imported here: a customer's file and its basis are read where there is no PyTorch.
    from qrlora_deploy.models.checkpoint import open_checkpoint

    if given is not None:
        checkpoint = open_checkpoint(given)
        if checkpoint.digest != coefficients.base_digest:
            raise BasisMismatchError(
                f"{file} was trained on a base with digest {coefficients.base_digest[:12]}, but {given} has "
                f"{checkpoint.digest[:12]}; give the base it was trained on"
            )
        return checkpoint
    refused = []
    for candidate in _base_names(coefficients.base_name, file.parent):
        checkpoint = open_checkpoint(candidate)
        if checkpoint.digest == coefficients.base_digest:
            return checkpoint
        refused.append(f"{candidate} has {checkpoint.digest[:12]}")
    name = coefficients.base_name
    if refused:
        raise BasisMismatchError(
            f"{file} was trained on {name} with digest {coefficients.base_digest[:12]}, but "
            f"{'; '.join(refused)}; give the right BASE"
        )
    raise InputError(f"{file} was trained on {name}, which is not found; give BASE, a folder or a hub name")


def _base_names(name: str, folder: Path) -> list[str]:
    local = [str(place) for place in _places(name, folder) if is_file(place / "config.json")]
    # The hub is asked only when nothing local has the name: reading a file should not call home.
    return local or ([name] if HUB_NAME.fullmatch(name) else [])


def _places(recorded: str, folder: Path) -> list[Path]:
    if not recorded:
        return []
    path = Path(recorded)
    places = [folder / path, path, folder / path.name, Path(path.name)]
    return list({place.absolute(): place for place in places}.values())
