"""The files that jobs take, by their path or as the object that was read before; needs no PyTorch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis, read_basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients
from qrlora_deploy.models.locating import locate_basis

StrPath: TypeAlias = str | os.PathLike[str]
"""A path, relative to the current folder or absolute."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (description, done, total) after each step."""


def as_basis(basis: StrPath | Basis) -> Basis:
    """The basis: a file, or a `Basis`.

    Raises:
        InputError: the file cannot be read.
        FileFormatError: it is damaged.
    """
    return basis if isinstance(basis, Basis) else read_basis(Path(basis))


def as_coefficients(coefficients: StrPath | Coefficients) -> Coefficients:
    """The customer: a file, or `Coefficients`.

    Raises:
        InputError: the file cannot be read.
        FileFormatError: it is damaged.
    """
    return coefficients if isinstance(coefficients, Coefficients) else read_coefficients(Path(coefficients))


def customer_with_basis(
    basis: StrPath | Basis | None, coefficients: StrPath | Coefficients
) -> tuple[Basis, Coefficients]:
    """A customer and its basis; what is None is looked for where the customer's file remembers it.

    Raises:
        InputError: a file cannot be read, or nothing remembers where the basis is.
        BasisMismatchError: the customer was trained on another basis.
    """
    customer = as_coefficients(coefficients)
    if isinstance(basis, Basis):
        customer.check_fits(basis)
        return basis, customer
    if not isinstance(coefficients, Coefficients):
        return locate_basis(customer, Path(coefficients), None if basis is None else Path(basis)), customer
    if basis is None:
        raise InputError("basis: give a basis; only a coefficients file remembers where its own is")
    frozen = as_basis(basis)
    customer.check_fits(frozen)
    return frozen, customer
