"""Metrics of many customers at once, as `Task.score` gives them for one."""

from dataclasses import dataclass

import numpy as np

from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.regression import Regression


@dataclass(frozen=True)
class Answers:
    """What customers answered to their held-out rows, one element a row.

    Attributes:
        slots: `[n]` whose rows they are.
        values: `[n]` the label, or the number of a regression.
        targets: `[n]` what is right.
        finite: `[n]` whether the answer was made of numbers.
    """

    slots: np.ndarray
    values: np.ndarray
    targets: np.ndarray
    finite: np.ndarray


def score_answers(answers: Answers, regression: np.ndarray) -> dict[int, dict[str, float]]:
    """Metrics by slot, of the customers all of whose answers are numbers.

    Args:
        answers: of some customers.
        regression: `[slots]` bool, whether a customer predicts a number.
    """
    unsound = np.unique(answers.slots[~answers.finite])
    sound = np.setdiff1d(np.unique(answers.slots), unsound)
    found = {}
    for slot in sound[regression[sound]].tolist():
        own = answers.slots == slot
        found[slot] = Regression().score(answers.values[own, None], answers.targets[own])
    labelled = sound[~regression[sound]]
    if len(labelled):
        own = np.isin(answers.slots, labelled)
        chosen, targets = (part[own].astype(np.int64) for part in (answers.values, answers.targets))
        counted = count_scores(np.searchsorted(labelled, answers.slots[own]), chosen, targets, len(labelled))
        found |= dict(zip(labelled.tolist(), counted, strict=True))
    return found


def count_scores(owners: np.ndarray, chosen: np.ndarray, targets: np.ndarray, customers: int) -> list[dict[str, float]]:
    """Accuracy, f1 and matthews of each customer of a classification.

    Args:
        owners: `[n]`, whose row this is, from 0 to `customers` - 1.
        chosen: `[n]`, the label that was answered.
        targets: `[n]`, the label that is right.
        customers: how many there are; each has one row at least.

    Returns:
        One dictionary a customer, named as `Classification.metrics` names them.
    """
    labels = int(max(chosen.max(), targets.max())) + 1

    def count(label: np.ndarray, rows: np.ndarray) -> np.ndarray:
        counts = np.bincount(owners[rows] * labels + label[rows], minlength=customers * labels)
        return counts.reshape(customers, labels).astype(np.float64)

    everything = np.ones(len(owners), dtype=bool)
    right, answered, expected = count(chosen, chosen == targets), count(chosen, everything), count(targets, everything)
    rows = expected.sum(1)
    accuracy = right.sum(1) / rows
    # As scikit-learn's macro average: over the labels that were answered or expected.
    seen = answered + expected
    f1 = np.divide(2 * right, seen, out=np.zeros_like(right), where=seen > 0).sum(1) / (seen > 0).sum(1)
    covariance = right.sum(1) * rows - (answered * expected).sum(1)
    spread = (rows**2 - (answered**2).sum(1)) * (rows**2 - (expected**2).sum(1))
    matthews = np.divide(covariance, np.sqrt(spread), out=np.zeros_like(rows), where=spread > 0)
    names = Classification.metrics
    return [dict(zip(names, map(float, row), strict=True)) for row in zip(accuracy, f1, matthews, strict=True)]
