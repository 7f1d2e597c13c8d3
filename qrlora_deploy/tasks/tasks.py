"""What is learned from the labels: classes or a number, and how the result is scored."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.labels import (
    DECIMAL_COMMA,
    canonical,
    is_fraction,
    number_of,
    quoted,
    stands_for_no_number,
)
from qrlora_deploy.errors import InputError

CLASSIFICATION = "text-classification"
REGRESSION = "text-regression"

METRICS = {CLASSIFICATION: ("accuracy", "f1", "matthews"), REGRESSION: ("pearson", "spearman")}
"""The metrics of each task; the first one chooses the best checkpoint."""


CHOICES = {"classification": CLASSIFICATION, "regression": REGRESSION}
"""What `--task` says, beside "auto", and the task it stands for."""

OR_A_NAME = "or say --task classification if it is a name"


@dataclass(frozen=True)
class Guess:
    """What labels are taken for.

    Attributes:
        task: "text-classification" or "text-regression".
        reason: why it is a regression, where nobody said so; else empty.
    """

    task: str
    reason: str = ""


def choose_task(examples: Examples, wanted: str = "auto") -> Guess:
    """The task of labels: what was asked for, or else what they look like.

    It is a regression where every label is a number and one is written with a decimal point. Whole numbers such as
    GLUE's 0 and 1 are names of classes.

    Args:
        examples: the training data.
        wanted: "auto", "classification" or "regression".

    Raises:
        InputError: it is not clear: all labels are numbers but for some that say that a number is missing, or
            numbers have a comma for a point. The row and the label are named.
    """
    if wanted != "auto":
        return Guess(CHOICES[wanted])
    labels = examples.labels
    others = {label for label in labels if number_of(label) is None}
    if others and all(DECIMAL_COMMA.fullmatch(label) for label in others):
        raise InputError(f"{_first(examples, others)}, a number with a comma; write a point, {OR_A_NAME}")
    if others and others != set(labels) and all(map(stands_for_no_number, others)):
        raise InputError(f"{_first(examples, others)} where the others are numbers; leave such rows out, {OR_A_NAME}")
    fractions = {label for label in labels if is_fraction(label)}
    if others or not fractions:
        return Guess(CLASSIFICATION)
    return Guess(REGRESSION, f"{_first(examples, fractions)}; --task classification takes numbers as names")


def _first(examples: Examples, wanted: Container[str]) -> str:
    """The first row with one of the labels `wanted`, as a message begins."""
    row, label = next((row, label) for row, label in enumerate(examples.labels, start=1) if label in wanted)
    return f"{examples.name}: row {row} has the label {label!r}"


def label_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The classes in the order of a new head: whole numbers by value, names by the alphabet."""
    names = set(labels)
    if all(name.isdecimal() for name in names):
        # By value, and without making a number of thousands of digits.
        return tuple(sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name)))
    return tuple(sorted(names))


def label_index(names: Sequence[str]) -> dict[str, int]:
    """The output that each label of data means.

    `LABEL_0`, `LABEL_1` and so on, which transformers gives to outputs without names, are also meant by their
    numbers alone, where all names are of that kind. So is a name by another spelling of the same: 1.0 for 1.
    """
    index = {name: position for position, name in enumerate(names)}
    if all(name == f"LABEL_{position}" for name, position in index.items()):
        index |= {str(position): position for position in range(len(names))}
    return {canonical(name): position for name, position in reversed(index.items())} | index


def output_of(index: Mapping[str, int], label: str) -> int | None:
    """The output that a label of data means, by an index from `label_index`; None where it means none."""
    return index.get(label, index.get(canonical(label)))


def encode_labels(examples: Examples, task: str, names: Sequence[str]) -> list[int] | list[float]:
    """Targets of the model: the index of the label in `names`, or its value for a regression.

    Raises:
        InputError: labels that are not among the names, or that are no finite numbers; all of them
            are counted, the first ones named.
    """
    labels = examples.labels
    if task == REGRESSION:
        values = [number_of(label) for label in labels]
        wrong = sorted({label for label, value in zip(labels, values, strict=True) if value is None})
        if wrong:
            raise InputError(f"{_first(examples, wrong)}; a regression needs numbers as labels, not {quoted(wrong)}")
        return [value for value in values if value is not None]
    index = label_index(names)
    found = {label: output_of(index, label) for label in set(labels)}
    unknown = sorted(label for label, position in found.items() if position is None)
    if unknown:
        raise InputError(
            f"{examples.name}: unknown label{'s' if len(unknown) > 1 else ''} {quoted(unknown)}; "
            f"the head knows {quoted(names)}"
        )
    return [position for label in labels if (position := found[label]) is not None]


def score(task: str, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """The metrics of a task, all of them finite where the logits are.

    Args:
        task: "text-classification" or "text-regression".
        logits: `[n, labels]`, or `[n, 1]` for a regression.
        targets: `[n]`, from `encode_labels`.

    Returns:
        accuracy, f1 (the mean over the classes) and matthews; or pearson and spearman, which are 0
        where the predictions or targets are constant and no correlation is defined.
    """
    # Imported here: scikit-learn takes a second, and labels are checked before it is needed.
    from scipy import stats
    from sklearn import metrics

    if task == REGRESSION:
        predicted = np.asarray(logits, dtype=np.float64).reshape(-1)
        expected = np.asarray(targets, dtype=np.float64)
        if len(expected) < 2 or np.ptp(predicted) == 0 or np.ptp(expected) == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        return {
            "pearson": float(stats.pearsonr(predicted, expected).statistic),
            "spearman": float(stats.spearmanr(predicted, expected).statistic),
        }
    chosen = np.asarray(logits).argmax(axis=-1)
    return {
        "accuracy": float(metrics.accuracy_score(targets, chosen)),
        "f1": float(metrics.f1_score(targets, chosen, average="macro", zero_division=0)),
        "matthews": float(metrics.matthews_corrcoef(targets, chosen)),
    }


def uncorrelated(metrics: Mapping[str, float]) -> str | None:
    """The name of the correlation of answers and labels where it is exactly 0, as when all answers are alike.

    Args:
        metrics: from `score`; empty where nothing was held out.
    """
    return next((name for name in ("matthews", "pearson") if metrics.get(name) == 0.0), None)
