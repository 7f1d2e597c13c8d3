"""A number of directions for all weights together, the same in each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qrlora_deploy.rank_rules.budgets import check_budget, check_enough, largest, shares


@dataclass(frozen=True)
class EvenBudget:
    """`total` directions over all weights, as evenly as their sizes allow.

    Every weight has the same rank, or its numerical rank where that is lower. What is left over, fewer than there are
    weights with room, goes one each to those whose next direction has the largest share of its weight's energy. A
    weight that gets none is left out of the basis, which happens where there are more weights than directions.

    Attributes:
        total: how many directions, at least 1.

    Raises:
        InputError: the total is out of range.
    """

    total: int

    kind: ClassVar[str] = "even-budget"
    per_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_budget(self.total)

    def __str__(self) -> str:
        return f"{self.total} directions, evenly"

    @property
    def parameters(self) -> dict[str, Any]:
        """The total."""
        return {"total": self.total}

    def choose(self, diagonals: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The rank of each target, `total` together.

        Raises:
            InputError: the weights together have fewer directions.
        """
        found = shares(diagonals)
        room = np.array([len(values) for values in found.values()])
        check_enough(self.total, int(room.sum()))
        level = _level(room, self.total)
        left = self.total - int(np.minimum(room, level).sum())
        following = {name: values[level : level + 1] for name, values in found.items()}
        more = largest(following, left)
        return {name: min(len(values), level) + len(more[name]) for name, values in found.items()}


def _level(room: np.ndarray, total: int) -> int:
    """The highest rank that all weights can have, each at most its `room [targets]`, within `total` directions."""
    low, high = 0, int(room.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        fits = int(np.minimum(room, middle).sum()) <= total
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
