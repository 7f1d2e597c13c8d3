"""Arithmetic that the rules share which spread a number of directions over all weights at once."""

from collections.abc import Mapping

import numpy as np

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.rank_rules.base import numerical_rank, squares

MAX_BUDGET = 2**31 - 1
"""Beyond any base; more is a slip of the hand."""


def check_budget(total: int) -> None:
    """Refuse a number of directions that cannot be meant.

    Raises:
        InputError: it is no whole number from 1 to `MAX_BUDGET`.
    """
    if type(total) is not int or not 1 <= total <= MAX_BUDGET:
        raise InputError(f"{argument('budget', total)} must be a whole number of at least 1 and at most {MAX_BUDGET}")


def check_enough(total: int, available: int) -> None:
    """Refuse a budget that the weights together cannot spend.

    Args:
        total: the budget.
        available: the directions of all weights that are more than rounding noise.

    Raises:
        InputError: there are fewer directions.
    """
    if total > available:
        raise InputError(
            f"{argument('budget', total)} is more than the chosen layers have; give {available} at most, or more layers"
        )


def shares(diagonals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each direction's share of its own weight's energy, `R_ii^2 / sum_j R_jj^2`, without directions that are noise.

    Shares and not energies, since the scale of a weight says nothing: a value projection twice as large before an
    output projection half as large is the same network, and so are a gain of a LayerNorm and the weight behind it.

    Args:
        diagonals: the whole diagonal of R by the target's name, `[min(out, in)]`.

    Returns:
        `[numerical rank]` fp64 by the target's name, not increasing; none for a zero weight.
    """
    found = {}
    for name, diagonal in diagonals.items():
        energies = squares(diagonal)
        found[name] = energies[: numerical_rank(energies)] / (float(energies.sum()) or 1.0)
    return found


def largest(scores: Mapping[str, np.ndarray], total: int) -> dict[str, np.ndarray]:
    """The directions with the `total` largest scores of all weights together; of equal ones those that come first.

    Args:
        scores: of every direction by the target's name, `[k]`.
        total: how many, at most as many as there are.

    Returns:
        The directions of each target, `[kept]` increasing indices; none where nothing is kept.
    """
    together = np.concatenate([np.asarray(values, dtype=np.float64) for values in scores.values()])
    kept = np.zeros(len(together), dtype=bool)
    kept[np.argsort(-together, kind="stable")[:total]] = True
    ends = np.cumsum([len(values) for values in scores.values()])[:-1]
    return {name: np.flatnonzero(part) for name, part in zip(scores, np.split(kept, ends), strict=True)}
