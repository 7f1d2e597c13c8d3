"""Accuracy on held-out text, and the time of one text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.tasks.classification import Classification

BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        all_labels: the answer may be any label of the head.
        own_labels: the answer is the best of the customer's own labels.
    """

    all_labels: float
    own_labels: float


class Scorer:
    """A base with side branches, scored with one customer's coefficients after another's.

    Args:
        checkpoint: a base with a task head.
        basis: made from it.
        max_length: tokens of a text that are read.
    """

    def __init__(self, checkpoint: Checkpoint, basis: Basis, max_length: int) -> None:
        self.labels = checkpoint.labels
        self.basis = basis
        self.max_length = max_length
        self.tokenizer = checkpoint.tokenizer()
        self.model = checkpoint.load_model()
        self.adapters = attach(self.model, basis)

    def accuracy(self, examples: Examples, values: np.ndarray | None) -> Accuracy:
        """Accuracy on `examples` with the coefficients `values` `[total_rank]`, or with zeros.

        Raises:
            InputError: a label is not among those of the head.
        """
        zeros = np.zeros(self.basis.total_rank, dtype=np.float32)
        set_coefficients(self.adapters, self.basis, zeros if values is None else values)
        task = Classification()
        targets = np.array(task.encode(examples, self.labels))
        logits = self._logits(examples.texts)
        own = np.full_like(logits, -np.inf)
        columns = np.unique(targets)
        own[:, columns] = logits[:, columns]
        return Accuracy(*(task.score(each, targets)["accuracy"] for each in (logits, own)))

    def _logits(self, texts: Sequence[str]) -> np.ndarray:
        return np.concatenate(
            [
                torch_logits(self.model, self.tokenizer, texts[start : start + BATCH], self.max_length)
                for start in range(0, len(texts), BATCH)
            ]
        )


def torch_logits(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> np.ndarray:
    """Logits `[texts, labels]` of a transformers model."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt").to(
        model.device
    )
    with torch.inference_mode():
        logits: np.ndarray = model(**inputs).logits.cpu().numpy()
    return logits


def median_ms(call: Callable[[str], Any], texts: Sequence[str], runs: int) -> float:
    """Median time of `call` in milliseconds over `runs` calls, each with the next of the `texts`."""
    times = []
    for run in range(runs):
        text = texts[run % len(texts)]
        start = time.perf_counter()
        call(text)
        times.append(time.perf_counter() - start)
    return median(times) * 1000
