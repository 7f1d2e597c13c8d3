"""Any number of labels a text, each decided by itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qrlora_deploy.data.labels import Label, quoted
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.base import Answer, NewHead, Task
from qrlora_deploy.tasks.counting import divided, named_scores
from qrlora_deploy.tasks.names import first_row, label_index, label_names, output_of
from qrlora_deploy.tasks.thresholds import best_thresholds, cuts_of
from qrlora_deploy.tokenization.words import LocatedWords

if TYPE_CHECKING:
    import torch

    from qrlora_deploy.data.examples import Examples

SEPARATOR = "|"
"""Between the labels of a row in a column of texts."""


class MultiLabel(Task):
    """Every text has any number of labels: a list in JSON lines or Parquet, or `a|b` in a table of texts.

    Args:
        thresholds: for each label the probability from which on it applies; empty: 0.5 for all of them.
    """

    name = "text-multi-label"
    option = "multi-label"
    problem_type = "multi_label_classification"
    metrics = ("f1_micro", "f1_macro", "accuracy")
    signal = "f1_micro"
    judges_labels = True

    def __init__(self, thresholds: Sequence[float] = ()) -> None:
        self.thresholds = tuple(thresholds)

    def deciding_at(self, thresholds: Sequence[float]) -> "MultiLabel":
        """As `Task.deciding_at`."""
        return MultiLabel(thresholds) if thresholds else self

    def best_thresholds(self, logits: np.ndarray, targets: np.ndarray) -> tuple[float, ...]:
        """As `Task.best_thresholds`."""
        return best_thresholds(logits, targets)

    def applies(self, logits: np.ndarray) -> np.ndarray:
        """Whether each label of logits `[..., labels]` applies: its probability is its threshold or more.

        Behind the labels that have a threshold it is 0.5.
        """
        logits = np.asarray(logits)
        cuts = np.zeros(logits.shape[-1])
        cuts[: len(self.thresholds)] = cuts_of(self.thresholds)
        found: np.ndarray = logits >= cuts
        return found

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
        return self.row_losses(logits, targets).mean()

    def row_losses(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The mean binary cross entropy of each row over the labels that its customer has, as `Task.row_losses`."""
        from torch.nn import functional

        absent = logits.isneginf()
        # Absent labels are taken out before the loss: the gradient of an infinite logit is no number.
        finite = logits.float().masked_fill(absent, 0.0)
        losses = functional.binary_cross_entropy_with_logits(finite, targets.float(), reduction="none")
        return losses.masked_fill(absent, 0.0).sum(1) / (~absent).sum(1)

    def score(self, logits: np.ndarray, targets: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
        """F1 over all decisions together and as the mean over the labels, and the share of rows that are all right."""
        owners = np.zeros(len(logits), dtype=np.int64)
        return self.score_each(owners, np.asarray(logits), np.asarray(targets), 1)[0]

    def score_each(
        self, owners: np.ndarray, decisive: np.ndarray, targets: np.ndarray, customers: int
    ) -> list[dict[str, float]]:
        """The metrics of many customers counted at once, as `Task.score_each`."""
        present = ~np.isneginf(decisive)
        chosen, expected = self.applies(decisive), targets > 0.5

        def count(decisions: np.ndarray) -> np.ndarray:
            counts = np.zeros((customers, decisions.shape[1]))
            np.add.at(counts, owners, decisions)
            return counts

        right, seen = count(chosen & expected), count(chosen) + count(expected)
        f1_micro = divided(2 * right.sum(1), seen.sum(1))
        # As scikit-learn's macro average of a table of decisions: over all labels that the customer has.
        f1_macro = divided(2 * right, seen).sum(1) / (count(present) > 0).sum(1)
        whole = (chosen == expected).all(axis=1, keepdims=True)
        accuracy = count(whole)[:, 0] / np.bincount(owners, minlength=customers)
        return named_scores(self.metrics, f1_micro, f1_macro, accuracy)

    def answer(self, logits: np.ndarray, names: Sequence[str], words: LocatedWords | None = None) -> Answer:
        """The most likely label with its probability, and all labels that apply, in the order of the outputs."""
        best = int(logits.argmax())
        chosen = tuple(name for name, yes in zip(names, self.applies(logits), strict=True) if yes)
        return Answer(names[best], float(1 / (1 + np.exp(-np.float64(logits[best])))), chosen)

    def agreement(self, logits: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The share of labels that apply in both or in neither, of those that the customer has."""
        present = np.isfinite(others)
        equal = (self.applies(logits) == self.applies(others)) & present
        found: np.ndarray = equal.sum(axis=1) / np.maximum(present.sum(axis=1), 1)
        return found

    def right(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Whether all labels of the row apply and no others."""
        found: np.ndarray = (self.applies(logits) == (np.asarray(targets) > 0.5)).all(axis=1)
        return found
