"""The rule of the paper: a share of the energy of each weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.rank_rules.base import numerical_rank, squares


@dataclass(frozen=True)
class EnergyShare:
    """Of each weight the smallest rank r with `sum_{i<=r} R_ii^2 >= tau * sum_i R_ii^2`.

    Source: Liang and Bharadwaj, "QR-LoRA", arXiv 2508.21810.

    Attributes:
        tau: the share, above 0 and at most 1.

    Raises:
        InputError: tau is out of range.
    """

    tau: float = 0.5

    kind: ClassVar[str] = "energy-share"
    per_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise InputError(f"tau must be in (0, 1], not {self.tau}")

    def __str__(self) -> str:
        return f"tau {self.tau}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Tau."""
        return {"tau": self.tau}

    def choose(self, diagonals: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The rank of each target, at most its numerical rank and at least 1."""
        return {name: self._rank(squares(diagonal)) for name, diagonal in diagonals.items()}

    def _rank(self, energies: np.ndarray) -> int:
        total = float(energies.sum())
        if total == 0:
            return 1
        cumulated = np.cumsum(energies) / total
        # The last sum may miss 1 by a rounding error, so tau = 1 is capped at the numerical rank.
        return max(1, min(int(np.searchsorted(cumulated, self.tau)) + 1, numerical_rank(energies)))
