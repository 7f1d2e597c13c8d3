"""Any number of labels a text, each decided by itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qrlora_deploy.data.labels import Label, quoted
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.base import Answer, NewHead, Task
from qrlora_deploy.tasks.names import first_row, label_index, label_names, output_of
from qrlora_deploy.tokenization.words import LocatedWords

if TYPE_CHECKING:
    import torch

    from qrlora_deploy.data.examples import Examples

SEPARATOR = "|"
"""Between the labels of a row in a column of texts."""

THRESHOLD = 0.5
"""The probability from which on a label applies."""


class MultiLabel(Task):
    """Every text has any number of labels: a list in JSON lines or Parquet, or `a|b` in a table of texts."""

    name = "text-multi-label"
    option = "multi-label"
    problem_type = "multi_label_classification"
    metrics = ("f1_micro", "f1_macro", "accuracy")
    signal = "f1_micro"
    trains_in_fleets = False

    def recognise(self, examples: "Examples") -> str | None:
        """A row has a list of labels, as `Task.recognise`."""
        return "" if any(not isinstance(label, str) for label in examples.labels) else None

    def names_in(self, label: Label) -> tuple[str, ...]:
        """The elements of a list, or what stands between the separators of a text."""
        if not isinstance(label, str):
            return label
        return tuple(part for part in map(str.strip, label.split(SEPARATOR)) if part)

    def new_head(self, examples: "Examples") -> NewHead:
        """One output a label, as `Task.new_head`."""
        names = label_names(self.named(examples))
        if not names:
            raise InputError(f"{examples.name}: no row has a label; there is nothing to learn")
        return NewHead(names)

    def encode(self, examples: "Examples", names: Sequence[str]) -> list[list[float]]:
        """1.0 for each output that a row's labels mean and 0.0 for the others, as `Task.encode`."""
        unknown = self.unknown(examples, names)
        if unknown:
            rows = {label for label in examples.labels if not set(self.names_in(label)).isdisjoint(unknown)}
            raise InputError(
                f"{first_row(examples, rows)}; unknown label{'s' if len(unknown) > 1 else ''} {quoted(unknown)}; "
                f"the head knows {quoted(names)}"
            )
        index = label_index(names)
        targets = [[0.0] * len(names) for _ in examples.labels]
        for target, label in zip(targets, examples.labels, strict=True):
            for name in self.names_in(label):
                position = output_of(index, name)
                if position is not None:
                    target[position] = 1.0
        return targets

    def loss(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The mean binary cross entropy over rows and labels, targets `[n, labels]`."""
        from torch.nn import functional

        return functional.binary_cross_entropy_with_logits(logits.float(), targets.float())

    def score(self, logits: np.ndarray, targets: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
        """F1 over all decisions together and as the mean over the labels, and the share of rows that are all right."""
        from sklearn import metrics

        chosen, expected = applies(logits), np.asarray(targets) > 0.5
        return {
            "f1_micro": float(metrics.f1_score(expected, chosen, average="micro", zero_division=0)),
            "f1_macro": float(metrics.f1_score(expected, chosen, average="macro", zero_division=0)),
            "accuracy": float((chosen == expected).all(axis=1).mean()),
        }

    def answer(self, logits: np.ndarray, names: Sequence[str], words: LocatedWords | None = None) -> Answer:
        """The most likely label with its probability, and all labels that apply, in the order of the outputs."""
        best = int(logits.argmax())
        chosen = tuple(name for name, yes in zip(names, applies(logits), strict=True) if yes)
        return Answer(names[best], float(1 / (1 + np.exp(-np.float64(logits[best])))), chosen)

    def agreement(self, logits: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The share of labels that apply in both or in neither, of those that the customer has."""
        present = np.isfinite(others)
        equal = (applies(logits) == applies(others)) & present
        found: np.ndarray = equal.sum(axis=1) / np.maximum(present.sum(axis=1), 1)
        return found

    def right(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Whether all labels of the row apply and no others."""
        found: np.ndarray = (applies(logits) == (np.asarray(targets) > 0.5)).all(axis=1)
        return found


def applies(logits: np.ndarray) -> np.ndarray:
    """Whether each label of logits `[..., labels]` applies: its probability is `THRESHOLD` or more."""
    found: np.ndarray = np.asarray(logits) >= np.log(THRESHOLD / (1 - THRESHOLD))
    return found
