"""The same rank for every weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.rank_rules.base import numerical_rank, squares

MAX_RANK = 2**31 - 1
"""Beyond any matrix; more is a slip of the hand."""


@dataclass(frozen=True)
class FixedRank:
    """The same number of directions of each weight, fewer where its numerical rank is lower.

    Attributes:
        rank: how many, at least 1.

    Raises:
        InputError: the rank is out of range.
    """

    rank: int

    kind: ClassVar[str] = "fixed-rank"
    per_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= MAX_RANK:
            raise InputError(f"rank must be a whole number of at least 1 and at most {MAX_RANK}, not {self.rank}")

    def __str__(self) -> str:
        return f"rank {self.rank}"

    @property
    def parameters(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}

    def choose(self, diagonals: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The rank of each target, at most its numerical rank and at least 1."""
        return {name: max(1, min(self.rank, numerical_rank(squares(diagonal)))) for name, diagonal in diagonals.items()}
