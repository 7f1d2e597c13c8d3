"""Weighted sums of customers: `ΔW = Q diag(c) R` is linear in `c`, so coefficients on one basis add up."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qrlora_deploy.errors import BasisMismatchError, InputError, argument
from qrlora_deploy.formats.coefficients import Coefficients

MAX_WEIGHT = float(np.finfo(np.float32).max)


def combine(parts: Sequence[tuple[Coefficients, float]], names: Sequence[str] = ()) -> Coefficients:
    """The customer `Σ weight * c`, each sum formed in fp64 without loss and rounded once to fp32.

    The order of the parts changes no bit. The result has the base, task and labels that the parts
    have in common, and no thresholds; its training record says what it was made of.

    Args:
        parts: customers, values `[total_rank]` each, and their weights, which may be negative.
        names: what messages call the parts, such as their files.

    Raises:
        BasisMismatchError: two parts belong to different bases or models; both are named.
        InputError: there are no parts, a part has a head of its own, task or labels differ, a
            weight is not a number of fp32, or a sum does not fit fp32.
    """
    if not parts:
        raise InputError("there is nothing to combine: give one customer at least")
    called = list(names) or [f"part {number}" for number in range(1, len(parts) + 1)]
    first = parts[0][0]
    for (part, weight), name in zip(parts, called, strict=True):
        if not abs(weight) <= MAX_WEIGHT:
            raise InputError(f"{name}: the weight {weight} is not a finite number that fits fp32")
        _check_alike(first, part, called[0], name)
    _check_no_heads(parts, called)
    with np.errstate(over="ignore"):
        values = _weighted_sum(parts).astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise InputError(
            f"the sum of {', '.join(called)} does not fit fp32 at {len(wrong)} of {len(values)} places "
            f"(first: {wrong[0]}); give smaller weights"
        )
    made_of = [{"digest": part.digest, "weight": float(weight)} for part, weight in parts]
    # Thresholds were found for the logits of one part; those of the sum are others.
    return replace(first, values=values, thresholds=(), training={"combined": made_of})


def _check_alike(first: Coefficients, other: Coefficients, first_name: str, name: str) -> None:
    for what, one, two in (
        ("basis", first.basis_digest, other.basis_digest),
        ("base", first.base_digest, other.base_digest),
    ):
        if one != two:
            raise BasisMismatchError(
                f"{first_name} was trained on {what} {one[:12]}, but {name} on {two[:12]}; only coefficients of "
                f"one {what} add up"
            )
    if first.task != other.task:
        raise InputError(f"{first_name} is for {first.task}, but {name} for {other.task}; they do not add up")
    if first.labels != other.labels:
        raise InputError(
            f"{first_name} and {name} have different labels ({_shown(first.labels)} and {_shown(other.labels)}); "
            "their logits mean different things"
        )
    if first.values.shape != other.values.shape:
        raise InputError(
            f"{first_name} has {first.values.size} coefficients, but {name} has {other.values.size}; one is damaged"
        )


def _shown(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")


def _check_no_heads(parts: Sequence[tuple[Coefficients, float]], called: Sequence[str]) -> None:
    # Coefficients trained under one head say nothing under another, and the mean of heads is no head.
    heads = [name for (part, _), name in zip(parts, called, strict=True) if part.head]
    if heads:
        others = [name for name in called if name not in heads]
        beside = f", so they cannot be combined with {', '.join(others)}" if others else ""
        raise InputError(
            f"{', '.join(heads)}: customers with a head of their own do not add up{beside}; "
            f"train with {argument('head', 'frozen')}"
        )


def _weighted_sum(parts: Sequence[tuple[Coefficients, float]]) -> np.ndarray:
    """`[total_rank]` fp64, the exact sums rounded to nearest."""
    products = []
    for part, weight in parts:
        values = part.values.astype(np.float64)
        if len(parts) == 1:
            # As it is: a sum would lose the sign of a zero.
            return values * weight
        # 24 bits of a value times the 24 high or 29 low bits of a weight fit the 53 of fp64: exact.
        high = float(np.float32(weight))
        products += [values * high, values * (weight - high)]
    return np.array([math.fsum(column) for column in np.stack(products, axis=1)], dtype=np.float64)
