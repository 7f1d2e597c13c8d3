"""Where jobs begin: a base by its folder or hub name, labelled text by its file, or the object that was read before."""

import os
from contextlib import suppress
from pathlib import Path

from qrlora_deploy.api.inputs import StrPath, as_coefficients
from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.locating import locate_base


def as_checkpoint(base: StrPath | Checkpoint) -> Checkpoint:
    """The base: a folder, a hub name, or a `Checkpoint`.

    Raises:
        InputError: there is no such folder or repository.
    """
    return base if isinstance(base, Checkpoint) else open_checkpoint(os.fspath(base))


def as_examples(
    data: StrPath | Examples,
    text_column: str | None,
    label_column: str | None,
    labelled: bool = True,
    written: bool = False,
) -> Examples:
    """Labelled text, or prompts and answers: a file, a hub data set, or `Examples`, whose columns are known already.

    Raises:
        InputError: nothing can be read there, as of `read_examples`.
    """
    if isinstance(data, Examples):
        return data
    return read_examples(os.fspath(data), text_column, label_column, labelled=labelled, written=written)


def base_of(base: StrPath | Checkpoint | None, coefficients: StrPath | Coefficients) -> Checkpoint:
    """The base of a customer; where it is None it is looked for where the customer's file remembers it.

    Raises:
        InputError: there is no such base, or nothing remembers where it is.
        BasisMismatchError: the customer was trained on other weights.
    """
    if isinstance(base, Checkpoint):
        return base
    if not isinstance(coefficients, Coefficients):
        given = None if base is None else os.fspath(base)
        return locate_base(as_coefficients(coefficients), Path(coefficients), given)
    if base is None:
        raise InputError("base: give a folder or a hub name; only a coefficients file remembers its base")
    return as_checkpoint(base)


def base_if_found(base: StrPath | Checkpoint | None, coefficients: StrPath | Coefficients) -> Checkpoint | None:
    """As `base_of`, but None where nothing is given and nothing is found.

    Raises:
        InputError: as of `base_of`, of a base that is given.
    """
    if base is not None:
        return base_of(base, coefficients)
    with suppress(InputError):
        return base_of(None, coefficients)
    return None
