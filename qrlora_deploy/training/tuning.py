"""Thresholds that are chosen on held-out rows, and what they are worth there."""

from dataclasses import dataclass, field

import numpy as np

from qrlora_deploy.tasks.base import Task


@dataclass(frozen=True)
class Tuned:
    """What became of the thresholds of a customer.

    Attributes:
        thresholds: for each label; empty where none were chosen.
        metrics: with them, on the rows that they were chosen on.
    """

    thresholds: tuple[float, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)


def tune(task: Task, logits: np.ndarray, targets: np.ndarray) -> Tuned:
    """The thresholds that are best on held-out rows of one customer.

    Args:
        task: the customer's, which `judges_labels`.
        logits: `[n, labels]`.
        targets: `[n, labels]`.
    """
    thresholds = task.best_thresholds(logits, targets)
    metrics = task.deciding_at(thresholds).score(logits, targets)
    return Tuned(thresholds, {name: round(value, 6) for name, value in metrics.items()})
