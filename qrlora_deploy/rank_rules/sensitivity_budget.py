"""A number of directions for all weights together, where the loss of some data is most sensitive."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.rank_rules.budgets import check_budget
from qrlora_deploy.rank_rules.seen import Seen


@dataclass(frozen=True)
class SensitivityBudget:
    """The `total` directions of all weights in which the loss has the largest mean square gradient.

    It follows from data and not from R's diagonal, so it says what was done and cannot be computed again from a basis:
    `qrlora_deploy.training.observing.sensitivities` finds the gradients. The directions of a weight need not be its
    leading ones.

    Attributes:
        total: how many directions, at least 1.
        seen: the data.

    Raises:
        InputError: the total is out of range.
    """

    total: int
    seen: Seen

    kind: ClassVar[str] = "sensitivity-budget"
    per_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_budget(self.total)

    def __str__(self) -> str:
        return f"{self.total} directions, by sensitivity on {self.seen}"

    @property
    def parameters(self) -> dict[str, Any]:
        """The total, and what was seen."""
        return {"total": self.total, "seen": self.seen.record}

    def choose(self, diagonals: Mapping[str, np.ndarray]) -> NoReturn:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError(f"the rank rule {self.kind} needs data, not diagonals; give them to factorize")
