"""How the logits of one customer become an answer."""

from dataclasses import dataclass

import numpy as np

from qrlora_deploy.tasks.base import Answer, Task


@dataclass(frozen=True)
class Answering:
    """The outputs of a customer, or of a base.

    Attributes:
        labels: their names.
        thresholds: of a multi-label customer, for each label the probability from which on it applies; empty: 0.5.
    """

    labels: tuple[str, ...]
    thresholds: tuple[float, ...] = ()

    def own(self, logits: np.ndarray) -> np.ndarray:
        """Of logits `[outputs]` the customer's: behind its own labels a customer has -inf."""
        return logits[: len(self.labels)]

    def answer(self, task: Task, logits: np.ndarray) -> Answer:
        """What logits `[outputs]` of a row say of its text."""
        return task.deciding_at(self.thresholds).answer(self.own(logits), self.labels)
