"""What is learned from the labels: classes or a number, and how the result is scored."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.training.data import Examples

CLASSIFICATION = "text-classification"
REGRESSION = "text-regression"

METRICS = {CLASSIFICATION: ("accuracy", "f1", "matthews"), REGRESSION: ("pearson", "spearman")}
"""The metrics of each task; the first one chooses the best checkpoint."""


def infer_task(labels: Sequence[str]) -> str:
    """Regression where every label is a number and one is written with a decimal point.

    Whole numbers such as GLUE's 0 and 1 are names of classes.
    """
    numbers = [_number(label) for label in labels]
    fractions = any(not label.lstrip("+-").isdigit() for label in labels)
    return REGRESSION if fractions and all(number is not None for number in numbers) else CLASSIFICATION


def label_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The classes in the order of a new head: whole numbers by value, names by the alphabet."""
    names = set(labels)
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def label_index(names: Sequence[str]) -> dict[str, int]:
    """The output that each label of data means.

    `LABEL_0`, `LABEL_1` and so on, which transformers gives to outputs without names, are also meant by their
    numbers alone, where all names are of that kind.
    """
    index = {name: position for position, name in enumerate(names)}
    if all(name == f"LABEL_{position}" for name, position in index.items()):
        index |= {str(position): position for position in range(len(names))}
    return index


def encode_labels(examples: Examples, task: str, names: Sequence[str]) -> list[int] | list[float]:
    """Targets of the model: the index of the label in `names`, or its value for a regression.

    Raises:
        InputError: labels that are not among the names, or that are no finite numbers; all of them
            are counted, the first ones named.
    """
    if task == REGRESSION:
        values = [_number(label) for label in examples.labels]
        wrong = sorted({label for label, value in zip(examples.labels, values, strict=True) if value is None})
        if wrong:
            raise InputError(f"{examples.name}: a regression needs numbers as labels, not {_listed(wrong)}")
        return [value for value in values if value is not None]
    index = label_index(names)
    unknown = sorted(set(examples.labels) - index.keys())
    if unknown:
        raise InputError(
            f"{examples.name}: unknown label{'s' if len(unknown) > 1 else ''} {_listed(map(repr, unknown))}; "
            f"the head knows {_listed(map(repr, names))}"
        )
    return [index[label] for label in examples.labels]


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


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _listed(several: Iterable[str]) -> str:
    names = list(several)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
