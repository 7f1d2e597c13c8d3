"""`qrlora_deploy.training.tasks` as it was: functions that take a task by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.names import label_index, label_names, output_of
from qrlora_deploy.tasks.registry import Guess, guess_task, task_named
from qrlora_deploy.tasks.regression import Regression

__all__ = ["label_index", "label_names", "output_of"]

CLASSIFICATION, REGRESSION = Classification.name, Regression.name
METRICS = {task.name: task.metrics for task in (Classification, Regression)}
CHOICES = {task.option: task.name for task in (Classification, Regression)}


def choose_task(examples: Examples, wanted: str = "auto") -> Guess:
    """As `tasks.registry.guess_task`."""
    return guess_task(examples, wanted)


def encode_labels(examples: Examples, task: str, names: Sequence[str]) -> list[Any]:
    """As `Task.encode`."""
    return task_named(task).encode(examples, names)


def score(task: str, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """As `Task.score`."""
    return task_named(task).score(logits, targets)


def uncorrelated(metrics: Mapping[str, float]) -> str | None:
    """The name of the correlation of answers and labels where it is exactly 0."""
    return next((name for name in ("matthews", "pearson") if metrics.get(name) == 0.0), None)
