"""What a rank rule is. Needs no PyTorch: a serving host reads bases too."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class RankRule(Protocol):
    """How many directions of each weight are kept, from the diagonals of R of all of them at once.

    A rule is a frozen dataclass, whose fields are its parameters; `str` shows it to people. A class has `kind` and
    `per_target` once for all its rules.
    """

    @property
    def kind(self) -> str:
        """Its name in files."""

    @property
    def per_target(self) -> bool:
        """Whether the rank of each weight follows from its own diagonal alone.

        Such a rule is asked about a few weights at a time, so that each is factorized once; any other rule is asked
        about all weights together.
        """

    @property
    def parameters(self) -> dict[str, Any]:
        """Its fields by name, plain JSON values."""

    def choose(self, diagonals: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The rank of each target.

        Args:
            diagonals: the whole diagonal of R by the target's name: `[min(out, in)]`, non-negative, not increasing.

        Returns:
            The rank by the target's name, at most the length of its diagonal, and at least 1; a rule that sees all
            targets may give 0 to some, which leaves them out of the basis.

        Raises:
            InputError: the rule cannot be fulfilled.
        """


def squares(diagonal: np.ndarray) -> np.ndarray:
    """The energy of each direction, `R_ii^2`, `[k]` fp64."""
    return np.square(np.asarray(diagonal, dtype=np.float64))


def numerical_rank(energies: np.ndarray) -> int:
    """How many of the energies `[k]` are more than rounding noise: above (eps * k)^2 of the largest, as in LAPACK."""
    noise = (np.finfo(np.float64).eps * len(energies)) ** 2 * energies.max(initial=0.0)
    return int(np.sum(energies > noise))
