"""How the logits of one customer become an answer."""

from dataclasses import dataclass

import numpy as np

from qrlora_deploy.tasks.base import Answer, Task
from qrlora_deploy.tokenization.words import LocatedWords


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
        """Of logits `[outputs]` or `[tokens, outputs]` the customer's: behind its own labels a customer has -inf.

        All of them where outputs have no names.
        """
        return logits[..., : len(self.labels)] if self.labels else logits

    def answer(self, task: Task, logits: np.ndarray, words: LocatedWords | None = None) -> Answer:
        """What the logits of a row say of its text; `words` of the text, where each has an answer."""
        return task.deciding_at(self.thresholds).answer(self.own(logits), self.labels, words)
