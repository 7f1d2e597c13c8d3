"""A vector a text, near those of texts that mean the same."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qrlora_deploy.data.labels import canonical
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.tasks.base import Answer, NewHead, Task
from qrlora_deploy.tasks.names import check_pairs, first_row
from qrlora_deploy.tasks.pooling import pool, pooling_of
from qrlora_deploy.tokenization.words import LocatedWords

if TYPE_CHECKING:
    import torch

    from qrlora_deploy.data.examples import Examples

SCALE = 20.0
"""By what cosines are multiplied in the loss, the inverse of a temperature of 0.05: that of sentence-transformers."""

DEPTH = 10
"""Of `mrr_at_10`."""

BLOCK = 1024
"""Rows whose cosines with all second texts are in memory at once."""


class Embedding(Task):
    """Every text has a vector; data are pairs of texts that belong together, without labels.

    There is no head: an encoder's states are pooled, as its `modules.json` and `1_Pooling/config.json` say where it has
    them (sentence-transformers' files), else by the mean over the attention mask. Only coefficients are trained.
    """

    name = "feature-extraction"
    option = "embedding"
    problem_type = None
    model_class = "AutoModel"
    pipeline = "feature-extraction"
    peft_type = "FEATURE_EXTRACTION"
    output_shape = ("batch", "width")
    output_name = "embeddings"
    has_labels = False
    names_outputs = False
    least_batch = 2
    pairs_apart = True
    least_size = 0.0
    metrics = ("mrr_at_10", "accuracy_at_1")
    signal = "mrr_at_10"
    trains_in_fleets = False
    has_accuracy = False

    def recognise(self, examples: "Examples") -> str | None:
        """Never, as `Task.recognise`: data without labels is not read unless --task says so."""
        return None

    def fits_head(self, problem_type: str | None, outputs: int) -> bool:
        """Where no problem is named: the config of an encoder counts two outputs that it does not have."""
        return problem_type is None

    def new_head(self, examples: "Examples") -> NewHead:
        """There is none: always an InputError."""
        raise InputError(
            f"embeddings have no output layer: `train` with {argument('task', 'embedding')} takes an encoder as it is; "
            f"no warmup, no {argument('head')}"
        )

    def unknown(self, examples: "Examples", names: Sequence[str]) -> list[str]:
        """None: nothing is named."""
        return []

    def encode(self, examples: "Examples", names: Sequence[str]) -> list[float]:
        """1 a row: that its texts belong together, as `Task.encode`."""
        check_pairs(examples, self.option)
        others = {label for label in examples.labels if label and canonical(str(label)) not in ("1", "true")}
        if others:
            raise InputError(
                f"{first_row(examples, others)}; embeddings are trained on pairs that belong together: leave out rows "
                f"whose label is not 1"
            )
        return [1.0] * len(examples)

    def forward(self, model: Any, batch: Mapping[str, "torch.Tensor"]) -> "torch.Tensor":
        """Pooled states `[batch, width]` fp32, as `Task.forward`; a head that the model may have is not run."""
        states = model.base_model(**batch)[0]
        return pool(states, batch["attention_mask"], pooling_of(model.config))

    def by_row(self, answers: "torch.Tensor") -> "torch.Tensor":
        """`[2 n, width]`, all first texts and then all second ones, as `[n, 2 width]`."""
        import torch

        return torch.cat(answers.chunk(2), dim=1)

    def loss(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The mean cross entropy of finding each row's second text among those of the batch, by cosine.

        The second texts of the other rows are the negatives (Henderson et al., "Efficient Natural Language Response
        Suggestion for Smart Reply", arXiv 1705.00652), one-sided, with cosines times `SCALE`: what
        sentence-transformers calls MultipleNegativesRankingLoss, and others InfoNCE (van den Oord et al., arXiv
        1807.03748). The larger the batch, the harder; a text twice in a batch is its own negative.

        Args:
            logits: embeddings `[2 n, width]`, all first texts and then all second ones.
            targets: `[n]`, not looked at.
        """
        import torch
        from torch.nn import functional

        first, second = functional.normalize(logits.float(), dim=1).chunk(2)
        return functional.cross_entropy(SCALE * first @ second.T, torch.arange(len(first), device=logits.device))

    def score(self, logits: np.ndarray, targets: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
        """How well first texts find their second ones among those of all rows, by cosine.

        `accuracy_at_1` is the share found at the first place, `mrr_at_10` the mean of 1 / place where that is at most
        10, else 0. A text as near as the right one counts as nearer, so that vectors that are all alike find nothing.

        Args:
            logits: embeddings `[n, 2 width]`, from `by_row`.
            targets: `[n]`, not looked at.
        """
        first, second = (_unit(part) for part in np.split(np.asarray(logits, dtype=np.float64), 2, axis=1))
        own = np.einsum("ij,ij->i", first, second)
        # A cosine that is equal but for the order of its sum counts as equal.
        places = np.concatenate(
            [
                (first[start : start + BLOCK] @ second.T >= own[start : start + BLOCK, None] - 1e-12).sum(1)
                for start in range(0, len(first), BLOCK)
            ]
        )
        return {
            "mrr_at_10": float(np.where(places <= DEPTH, 1 / places, 0.0).mean()),
            "accuracy_at_1": float((places == 1).mean()),
        }

    def answer(self, logits: np.ndarray, names: Sequence[str], words: LocatedWords | None = None) -> Answer:
        """There are no names to answer with.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{self.name} answers with a vector")

    def agreement(self, logits: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The cosine of the two vectors of each row, 0 where it is negative."""
        found = np.einsum("ij,ij->i", _unit(logits), _unit(others))
        return np.clip(np.nan_to_num(found, nan=0.0), 0.0, 1.0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1 in fp64; those of zeros stay."""
    exact = np.asarray(vectors, dtype=np.float64)
    return exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), np.finfo(np.float64).tiny)
