"""A number of directions for all weights together, where the energy is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qrlora_deploy.rank_rules.budgets import check_budget, check_enough, largest, shares


@dataclass(frozen=True)
class EnergyBudget:
    """The `total` directions of all weights with the largest shares of their own weight's energy.

    The share of direction i is `R_ii^2 / sum_j R_jj^2`; `shares` says why it is not `R_ii^2` itself. A weight that gets
    no direction is left out of the basis.

    Attributes:
        total: how many directions, at least 1.

    Raises:
        InputError: the total is out of range.
    """

    total: int

    kind: ClassVar[str] = "energy-budget"
    per_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_budget(self.total)

    def __str__(self) -> str:
        return f"{self.total} directions, by energy"

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
        check_enough(self.total, sum(map(len, found.values())))
        # The shares of a weight do not increase, so that what is kept of it are its leading directions.
        return {name: len(kept) for name, kept in largest(found, self.total).items()}
