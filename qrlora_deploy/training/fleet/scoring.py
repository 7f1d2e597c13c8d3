"""Metrics of many customers at once, as `Task.score` gives them for one."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.tasks.base import Task
from qrlora_deploy.training.tuning import Tuned, tune


@dataclass(frozen=True)
class Answers:
    """What the customers of one task answered to their held-out rows, one element a row.

    Attributes:
        task: theirs.
        slots: `[n]` whose rows they are.
        decisive: `[n, width]`, as `Task.decisive` makes it of logits.
        targets: `[n]` what is right, or `[n, width]` where the task `judges_labels`.
        finite: `[n]` whether the answer was made of numbers.
    """

    task: Task
    slots: np.ndarray
    decisive: np.ndarray
    targets: np.ndarray
    finite: np.ndarray

    def tuned(self, slot: int, labels: int) -> Tuned:
        """The best thresholds of a customer, of a task that `judges_labels`, for these answers."""
        own = self.slots == slot
        return tune(self.task, self.decisive[own, :labels], self.targets[own, :labels])


def score_answers(answers: Iterable[Answers]) -> dict[int, dict[str, float]]:
    """Metrics by slot, of the customers all of whose answers are numbers."""
    found: dict[int, dict[str, float]] = {}
    for part in answers:
        sound = np.setdiff1d(part.slots, part.slots[~part.finite])
        own = np.isin(part.slots, sound)
        if not len(sound):
            continue
        owners = np.searchsorted(sound, part.slots[own])
        scores = part.task.score_each(owners, part.decisive[own], part.targets[own], len(sound))
        found |= dict(zip(sound.tolist(), scores, strict=True))
    return found
