"""One of several classes a text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qrlora_deploy.data.labels import quoted
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.tasks.base import Answer, NewHead, Task
from qrlora_deploy.tasks.counting import divided, named_scores
from qrlora_deploy.tasks.names import first_row, label_index, label_names, output_of
from qrlora_deploy.tokenization.words import LocatedWords

if TYPE_CHECKING:
    import torch

    from qrlora_deploy.data.examples import Examples


class Classification(Task):
    """Every text has one label."""

    name = "text-classification"
    option = "classification"
    problem_type = "single_label_classification"
    metrics = ("accuracy", "f1", "matthews")
    signal = "matthews"

    def recognise(self, examples: "Examples") -> str | None:
        """Whatever no other task takes: as `Task.recognise`."""
        return ""

    def new_head(self, examples: "Examples") -> NewHead:
        """One output a class, as `Task.new_head`."""
        names = label_names(_single(examples))
        if len(names) < 2:
            raise InputError(f"{examples.name}: every row has the label {names[0]}; a classifier needs two or more")
        return NewHead(names)

    def encode(self, examples: "Examples", names: Sequence[str]) -> list[int]:
        """The number of the output that each row's label means, as `Task.encode`."""
        labels = _single(examples)
        unknown = self.unknown(examples, names)
        if unknown:
            what = f"unknown label{'s' if len(unknown) > 1 else ''} {quoted(unknown)}"
            raise InputError(f"{first_row(examples, set(unknown))}; {what}; the head knows {quoted(names)}")
        index = label_index(names)
        found = {label: output_of(index, label) for label in set(labels)}
        return [position for label in labels if (position := found[label]) is not None]

    def loss(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The mean cross entropy, targets `[n]` int64."""
        return self.row_losses(logits, targets).mean()

    def row_losses(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The cross entropy of each row, as `Task.row_losses`."""
        from torch.nn import functional

        return functional.cross_entropy(logits.float(), targets.long(), reduction="none")

    def score(self, logits: np.ndarray, targets: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
        """Accuracy, f1 (the mean over the classes) and matthews."""
        # Imported here: scikit-learn takes a second, and labels are checked before it is needed.
        from sklearn import metrics

        chosen = np.asarray(logits).argmax(axis=-1)
        return {
            "accuracy": float(metrics.accuracy_score(targets, chosen)),
            "f1": float(metrics.f1_score(targets, chosen, average="macro", zero_division=0)),
            "matthews": float(metrics.matthews_corrcoef(targets, chosen)),
        }

    def decisive(self, logits: "torch.Tensor") -> "torch.Tensor":
        """The most likely class."""
        return logits.argmax(1, keepdim=True)

    def score_each(
        self, owners: np.ndarray, decisive: np.ndarray, targets: np.ndarray, customers: int
    ) -> list[dict[str, float]]:
        """The metrics of many customers counted at once, as `Task.score_each`."""
        chosen, targets = decisive[:, 0].astype(np.int64), targets.astype(np.int64)
        labels = int(max(chosen.max(), targets.max())) + 1

        def count(label: np.ndarray, rows: np.ndarray) -> np.ndarray:
            counts = np.bincount(owners[rows] * labels + label[rows], minlength=customers * labels)
            return counts.reshape(customers, labels).astype(np.float64)

        every = np.ones(len(owners), dtype=bool)
        right, answered, expected = count(chosen, chosen == targets), count(chosen, every), count(targets, every)
        rows = expected.sum(1)
        # As scikit-learn's macro average: over the labels that were answered or expected.
        seen = answered + expected
        f1 = divided(2 * right, seen).sum(1) / (seen > 0).sum(1)
        covariance = right.sum(1) * rows - (answered * expected).sum(1)
        spread = (rows**2 - (answered**2).sum(1)) * (rows**2 - (expected**2).sum(1))
        return named_scores(self.metrics, right.sum(1) / rows, f1, divided(covariance, np.sqrt(spread)))

    def answer(self, logits: np.ndarray, names: Sequence[str], words: LocatedWords | None = None) -> Answer:
        """The most likely class and its probability."""
        best = int(logits.argmax())
        # What `scores` has there: its odds are 1.
        return Answer(names[best], 1 / float(np.add.reduce(_odds(logits, logits[best]))), (names[best],))

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """The probability of each class."""
        odds = _odds(logits, logits.max())
        found: np.ndarray = odds / odds.sum()
        return found

    def agreement(self, logits: np.ndarray, others: np.ndarray) -> np.ndarray:
        """1 where the most likely class is the same one."""
        return (logits.argmax(axis=1) == others.argmax(axis=1)).astype(np.float64)

    def right(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Whether the most likely class is the row's."""
        found: np.ndarray = logits.argmax(axis=1) == targets
        return found


def _odds(logits: np.ndarray, largest: np.float32) -> np.ndarray:
    """How probable each class is, by the most likely one."""
    found: np.ndarray = np.exp(logits.astype(np.float64) - largest)
    return found


def _single(examples: "Examples") -> list[str]:
    """The labels of rows that have one each.

    Raises:
        InputError: a row has a list of them.
    """
    lists = {label for label in examples.labels if not isinstance(label, str)}
    if lists:
        raise InputError(
            f"{first_row(examples, lists)}, a list; {argument('task', 'multi-label')} takes any number a row"
        )
    return [label for label in examples.labels if isinstance(label, str)]
