"""One score a pair of texts: how well the second answers the first."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qrlora_deploy.data.labels import Label, number_of, quoted
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.tasks.base import Answer, NewHead, Task
from qrlora_deploy.tasks.names import check_pairs, first_row
from qrlora_deploy.tokenization.words import LocatedWords

if TYPE_CHECKING:
    import torch

    from qrlora_deploy.data.examples import Examples

RELEVANT = 0.5
"""The score, and the label, from which on the second text answers the first."""

LARGEST_BIAS = 4.0
"""Of a new head: it starts at the share of relevant pairs, between 2 and 98 %."""


class Reranking(Task):
    """Every pair of texts has a relevance from 0 to 1, as cross-encoders are trained for it.

    The head has one output, and a score is its sigmoid. transformers has no `problem_type` for that: with one output
    and none named it computes a squared error, so a base from the hub must be said to be a reranker.
    """

    name = "text-ranking"
    option = "reranker"
    problem_type = None
    pipeline = "text-ranking"
    names_outputs = False
    needs_pairs = True
    metrics = ("average_precision", "accuracy", "spearman")
    signal = "spearman"

    def recognise(self, examples: "Examples") -> str | None:
        """Never, as `Task.recognise`: 0 and 1 beside two texts are mostly classes."""
        return None

    def fits_head(self, problem_type: str | None, outputs: int) -> bool:
        """One output, of which transformers' own field says nothing."""
        return problem_type is None and outputs == 1

    def new_head(self, examples: "Examples") -> NewHead:
        """One output, which starts at the mean of the labels, as `Task.new_head`."""
        targets = self.encode(examples, ("score",))
        if len(set(targets)) < 2:
            raise InputError(
                f"{examples.name}: every row has the label {examples.labels[0]}; a reranker needs pairs that answer "
                f"each other and pairs that do not"
            )
        mean = float(np.mean(targets))
        return NewHead(("score",), float(np.clip(np.log(mean / (1 - mean)), -LARGEST_BIAS, LARGEST_BIAS)))

    def unknown(self, examples: "Examples", names: Sequence[str]) -> list[str]:
        """The labels that are no number from 0 to 1, sorted."""
        return sorted({str(label) for label in examples.labels if _relevance(label) is None})

    def encode(self, examples: "Examples", names: Sequence[str]) -> list[float]:
        """The labels as numbers, as `Task.encode`."""
        check_pairs(examples, self.option)
        values = [_relevance(label) for label in examples.labels]
        wrong = {label for label, value in zip(examples.labels, values, strict=True) if value is None}
        if wrong:
            raise InputError(
                f"{first_row(examples, wrong)}; a reranker needs numbers from 0 to 1 as labels, not "
                f"{quoted(sorted(map(str, wrong)))}; {argument('task', 'regression')} takes others"
            )
        return [value for value in values if value is not None]

    def loss(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The mean binary cross entropy, targets `[n]`; transformers has no such forward for one output."""
        return self.row_losses(logits, targets).mean()

    def row_losses(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The binary cross entropy of each row, as `Task.row_losses`."""
        from torch.nn import functional

        return functional.binary_cross_entropy_with_logits(logits[:, 0].float(), targets.float(), reduction="none")

    def decisive(self, logits: "torch.Tensor") -> "torch.Tensor":
        """The score, before its sigmoid."""
        return logits[:, :1]

    def score(self, logits: np.ndarray, targets: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
        """Average precision of the order of all pairs, the share of right decisions, and spearman.

        Average precision is 0 where no pair is relevant, and spearman where scores or labels are constant.
        """
        from scipy import stats
        from sklearn import metrics

        scores, expected = np.asarray(logits, dtype=np.float64)[:, 0], np.asarray(targets, dtype=np.float64)
        relevant = expected >= RELEVANT
        constant = len(expected) < 2 or np.ptp(scores) == 0 or np.ptp(expected) == 0
        return {
            "average_precision": float(metrics.average_precision_score(relevant, scores)) if relevant.any() else 0.0,
            "accuracy": float(self.right(logits, expected).mean()),
            "spearman": 0.0 if constant else float(stats.spearmanr(scores, expected).statistic),
        }

    def answer(self, logits: np.ndarray, names: Sequence[str], words: LocatedWords | None = None) -> Answer:
        """The score from 0 to 1; the only output applies where it is `RELEVANT` or more."""
        score = float(1 / (1 + np.exp(-np.float64(logits[0]))))
        return Answer(names[0], score, (names[0],) if score >= RELEVANT else ())

    def matches(self, found: Sequence[str], expected: Sequence[str], names: Sequence[str]) -> bool:
        """Whether a decision is that of a label, as `Task.matches`; `expected` is the label's number."""
        value = _relevance(expected[0])
        return value is not None and bool(found) == (value >= RELEVANT)

    def agreement(self, logits: np.ndarray, others: np.ndarray) -> np.ndarray:
        """1 where both say the pair is relevant, or both that it is not."""
        return (_decided(logits) == _decided(others)).astype(np.float64)

    def right(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Whether the decision is that of the label."""
        found: np.ndarray = _decided(logits) == (np.asarray(targets) >= RELEVANT)
        return found


def _decided(logits: np.ndarray) -> np.ndarray:
    """Whether each row of logits `[n, 1]` has a score of `RELEVANT` or more."""
    found: np.ndarray = np.asarray(logits)[:, 0] >= np.log(RELEVANT / (1 - RELEVANT))
    return found


def _relevance(label: Label) -> float | None:
    value = number_of(label) if isinstance(label, str) else None
    return value if value is not None and 0 <= value <= 1 else None
