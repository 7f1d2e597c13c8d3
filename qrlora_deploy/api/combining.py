"""Customers added up; needs no PyTorch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from qrlora_deploy.api.inputs import StrPath, as_coefficients
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.io.reading import is_file
from qrlora_deploy.merging.combining import combine as add_up

Part: TypeAlias = StrPath | Coefficients | tuple[StrPath | Coefficients, float]
"""A customer, or one with its weight."""


def combine(parts: Sequence[Part]) -> Coefficients:
    """Add customers of one basis up, each times its weight, 1 where none is given; negative takes away.

    The sum of their updates is the update of the sum, as `Q diag(c) R` is linear in `c`: exact to one rounding to
    fp32. How good the combined customer is, only data can tell.

    Args:
        parts: coefficients files or `Coefficients`, each alone or as (customer, weight).

    Returns:
        The customer, in memory; `save` writes it.

    Raises:
        InputError: there are no parts, one has a head of its own, task or labels differ, a weight is no number of
            fp32, or a sum does not fit fp32.
        BasisMismatchError: two parts belong to different bases or models; both are named.

    Examples:
        >>> acme = qr.Coefficients.load("customers/acme.safetensors")
        >>> none = qr.combine(["customers/acme.safetensors", (acme, -1)])
        >>> float(abs(none.values).max())
        0.0
    """
    weighed = [part if isinstance(part, tuple) else (part, 1.0) for part in parts]
    read = [(as_coefficients(customer), weight) for customer, weight in weighed]
    names = [
        f"part {number}" if isinstance(customer, Coefficients) else str(customer)
        for number, (customer, _weight) in enumerate(weighed, 1)
    ]
    combined = add_up(read, names)
    first = weighed[0][0]
    return combined if isinstance(first, Coefficients) else replace(combined, basis_file=_place(combined, Path(first)))


def _place(customer: Coefficients, file: Path) -> str:
    """Where the basis is: a place that a file remembers is seen from the file's own folder."""
    place = file.parent / customer.basis_file
    return str(place.resolve()) if customer.basis_file and is_file(place) else customer.basis_file
