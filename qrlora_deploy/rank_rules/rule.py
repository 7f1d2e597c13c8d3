"""How many directions of a weight are kept. Needs no PyTorch: a serving host reads bases too."""

from dataclasses import dataclass

import numpy as np

from qrlora_deploy.errors import InputError

MAX_RANK = 2**31 - 1
"""Beyond any matrix; more is a slip of the hand."""


@dataclass(frozen=True)
class RankRule:
    """How many directions of a weight are kept: `tau` or a fixed `rank`, exactly one of them.

    With `tau` the rank is the smallest r with `sum_{i<=r} R_ii^2 >= tau * sum_i R_ii^2`.
    """

    tau: float | None = 0.5
    rank: int | None = None

    def __post_init__(self) -> None:
        if (self.tau is None) == (self.rank is None):
            raise InputError("give either tau or a rank")
        if self.tau is not None and not 0 < self.tau <= 1:
            raise InputError(f"tau must be in (0, 1], not {self.tau}")
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise InputError(f"rank must be at least 1 and at most {MAX_RANK}, not {self.rank}")

    def ranks_of(self, diagonal: np.ndarray) -> int:
        """The rank kept for a weight with this `diagonal [k]` of R, at least 1."""
        energies = np.square(np.asarray(diagonal, dtype=np.float64))
        numerical = int(np.sum(energies > negligible(energies)))
        if self.tau is None:
            return max(1, min(self.rank or 1, numerical))
        total = float(energies.sum())
        if total == 0:
            return 1
        cumulated = np.cumsum(energies) / total
        # The last sum may miss 1 by a rounding error, so tau = 1 is capped at the numerical rank.
        return max(1, min(int(np.searchsorted(cumulated, self.tau)) + 1, numerical))


def negligible(energies: np.ndarray) -> float:
    """Energy below which a direction is rounding noise: (eps * k)^2 of the largest, as in LAPACK."""
    return float((np.finfo(np.float64).eps * len(energies)) ** 2 * energies.max(initial=0.0))
