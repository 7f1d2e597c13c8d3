"""A number a text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qrlora_deploy.data.labels import DECIMAL_COMMA, is_fraction, number_of, quoted, stands_for_no_number
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.tasks.base import Answer, NewHead, Task
from qrlora_deploy.tasks.names import first_row
from qrlora_deploy.tokenization.words import LocatedWords

if TYPE_CHECKING:
    import torch

    from qrlora_deploy.data.examples import Examples


class Regression(Task):
    """Every text has a number."""

    name = "text-regression"
    option = "regression"
    problem_type = "regression"
    metrics = ("pearson", "spearman")
    signal = "pearson"
    has_accuracy = False
    is_number = True
    names_outputs = False

    def recognise(self, examples: "Examples") -> str | None:
        """Every label is a number and one is written with a decimal point, as `Task.recognise`.

        Whole numbers such as GLUE's 0 and 1 are names of classes.

        Raises:
            InputError: all labels are numbers but for some that say that a number is missing, or numbers have a
                comma for a point.
        """
        labels = examples.labels
        others = {label for label in labels if not isinstance(label, str) or number_of(label) is None}
        texts = {label for label in others if isinstance(label, str)}
        if others and all(isinstance(label, str) and DECIMAL_COMMA.fullmatch(label) for label in others):
            raise InputError(f"{first_row(examples, others)}, a number with a comma; write a point, {_or_a_name()}")
        if others and others == texts != set(labels) and all(map(stands_for_no_number, texts)):
            raise InputError(
                f"{first_row(examples, others)} where the others are numbers; leave such rows out, {_or_a_name()}"
            )
        fractions = {label for label in labels if isinstance(label, str) and is_fraction(label)}
        if others or not fractions:
            return None
        return f"{first_row(examples, fractions)}; {argument('task', 'classification')} takes numbers as names"

    def new_head(self, examples: "Examples") -> NewHead:
        """One output, which starts at the mean of the labels, as `Task.new_head`.

        From 0 every row's first gradient says "more", and the encoder follows until all texts look alike.
        """
        return NewHead(("score",), float(np.mean(self.encode(examples, ("score",)))))

    def encode(self, examples: "Examples", names: Sequence[str]) -> list[float]:
        """The labels as numbers, as `Task.encode`."""
        values = [number_of(label) if isinstance(label, str) else None for label in examples.labels]
        wrong = {label for label, value in zip(examples.labels, values, strict=True) if value is None}
        if wrong:
            shown = quoted(sorted(map(str, wrong)))
            raise InputError(f"{first_row(examples, wrong)}; a regression needs numbers as labels, not {shown}")
        return [value for value in values if value is not None]

    def loss(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The mean squared error, targets `[n]`."""
        return self.row_losses(logits, targets).mean()

    def row_losses(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The squared error of each row, as `Task.row_losses`."""
        return (logits[:, 0].float() - targets.float()) ** 2

    def decisive(self, logits: "torch.Tensor") -> "torch.Tensor":
        """The number."""
        return logits[:, :1]

    def score(self, logits: np.ndarray, targets: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
        """Pearson and spearman; 0 where the predictions or targets are constant and no correlation is defined."""
        from scipy import stats

        predicted = np.asarray(logits, dtype=np.float64).reshape(-1)
        expected = np.asarray(targets, dtype=np.float64)
        if len(expected) < 2 or np.ptp(predicted) == 0 or np.ptp(expected) == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        return {
            "pearson": float(stats.pearsonr(predicted, expected).statistic),
            "spearman": float(stats.spearmanr(predicted, expected).statistic),
        }

    def answer(self, logits: np.ndarray, names: Sequence[str], words: LocatedWords | None = None) -> Answer:
        """The number itself."""
        return Answer(names[0], float(logits[0]), (names[0],))

    def agreement(self, logits: np.ndarray, others: np.ndarray) -> np.ndarray:
        """1: a number decides nothing."""
        return np.ones(len(logits))


def _or_a_name() -> str:
    return f"or say {argument('task', 'classification')} if it is a name"
