"""Accuracy on labelled rows, of PyTorch in fp32 and of the graph: what a precision costs the task.

Parity says how far logits moved, and a few rows are enough for that; whether labels became wrong
is only seen on many rows whose labels are known. A switchable bundle is measured as its base.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from exporters.onnx.prepared import Prepared
from qrlora_deploy.data.cutting import cut_texts, encode_words
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.models.loading import quiet_transformers
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE
from qrlora_deploy.runtime.verification.parity import run_logits
from qrlora_deploy.tasks.base import IGNORED, Task

MAX_ROWS = 512
"""Rows that are measured: one in 512 is 0.2 points, and PyTorch takes well under a minute on two cores."""

BATCH = 32
DESCRIPTION = "accuracy"

Inputs = dict[str, np.ndarray]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Labelled:
    """Rows whose labels are the model's.

    Attributes:
        batches: text inputs, int64 `[rows, length]` by name.
        task: of the model.
        targets: of the rows of each batch, from `Task.encode`.
        right: rows that PyTorch in fp32 answers right.
    """

    task: Task
    batches: Sequence[Inputs]
    targets: Sequence[np.ndarray]
    right: int = 0

    @property
    def rows(self) -> int:
        """Of all batches."""
        return sum(map(len, self.targets))


@dataclass(frozen=True)
class Accuracy:
    """Shares of right labels, of the graph and of PyTorch in fp32, on `rows` rows."""

    graph: float
    reference: float
    rows: int


def choose_labelled(examples: Examples | None, task: Task, labels: Sequence[str], strict: bool) -> Examples | None:
    """At most `MAX_ROWS` rows, spread evenly over the data, where their labels are the model's.

    Args:
        examples: as they were given; None: no data was given.
        task: of the model.
        labels: of the model.
        strict: whether data that has some of the labels must have no others. It must for a merged
            customer; texts for a switchable bundle may be any customer's.

    Returns:
        None where there is nothing to measure: none of the labels is the model's, so the data was
        given for its texts.

    Raises:
        InputError: some labels are the model's and some are not.
    """
    if examples is None or not task.has_accuracy or task.answers_words != (examples.words is not None):
        return None
    unknown = task.unknown(examples, labels)
    if unknown:
        if strict and len(unknown) < len(set(task.named(examples))):
            raise InputError(
                f"{examples.name}: {len(unknown)} of its labels are not the customer's: {', '.join(unknown[:3])}"
                f"{', ...' if len(unknown) > 3 else ''}; give data of this customer, "
                f"or name another {argument('label_column')}"
            )
        return None
    chosen = np.linspace(0, len(examples) - 1, min(len(examples), MAX_ROWS)).round().astype(int)
    return examples.take(chosen.tolist())


def answer_in_pytorch(
    prepared: Prepared, examples: Examples, task: Task, labels: Sequence[str], progress: Progress | None
) -> Labelled:
    """Batches of `examples`, and how many rows the model answers right.

    Args:
        prepared: whose model is in fp32, with the customer folded in, or the base.
        task: of the model.
        labels: of the model, in the order of its logits; all of the examples' are among them.
    """
    batches, targets, right = [], [], 0
    for start in range(0, len(examples), BATCH):
        part = examples.take(range(start, min(start + BATCH, len(examples))))
        inputs, expected = _batch(prepared, part, task, task.encode(part, labels))
        with torch.no_grad():
            found = prepared.task.forward(prepared.model, inputs).float().numpy()
        batches.append({name: tensor.numpy() for name, tensor in inputs.items()})
        targets.append(expected)
        right += int(task.right(found, targets[-1]).sum())
        if progress is not None:
            progress(f"{DESCRIPTION} in PyTorch", min(start + BATCH, len(examples)), len(examples))
    return Labelled(task, batches, targets, right)


def _batch(
    prepared: Prepared, part: Examples, task: Task, targets: list[Any]
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Inputs of the model, padded, and the targets of some rows."""
    tokenizer, length = prepared.tokenizer, prepared.max_tokens
    if not task.answers_words:
        texts, pairs = cut_texts(tokenizer, part.texts, part.pairs, length, part.name)
        encoded = tokenizer(texts, pairs, truncation=True, max_length=length, padding=True, return_tensors="pt")
        return {name: encoded[name] for name in prepared.input_names}, np.array(targets)
    encoded, located = encode_words(tokenizer, part, length)
    with quiet_transformers():  # which advises to pad in the call before, where lengths would be lost
        padded = tokenizer.pad(encoded, padding=True, return_tensors="pt")
    mask = padded["attention_mask"].numpy() != 0
    placed = np.full(mask.shape, IGNORED)
    for row, (target, words) in enumerate(zip(targets, located, strict=True)):
        placed[row, mask[row]] = task.place_target(target, words, int(mask[row].sum()))
    return {name: padded[name] for name in prepared.input_names}, placed


def measure_accuracy(
    session: Any, labelled: Labelled, tables: Inputs | None = None, progress: Progress | None = None
) -> Accuracy:
    """Run the graph on every batch.

    Args:
        session: of the graph.
        tables: of a switchable graph: its tables with the base as their only row, by input; of a per-row graph the
            base's numbers, `[1, width]`, by input.

    Raises:
        CheckFailed: the graph does not run on a batch.
    """
    right = done = 0
    for inputs, targets in zip(labelled.batches, labelled.targets, strict=True):
        fed = inputs if tables is None else inputs | _for_rows(tables, len(targets))
        found = run_logits(session, fed, f"a batch of {len(targets)} labelled rows")
        right += int(labelled.task.right(found, targets).sum())
        done += len(targets)
        if progress is not None:
            progress(f"{DESCRIPTION} of the graph", done, labelled.rows)
    return Accuracy(right / labelled.rows, labelled.right / labelled.rows, labelled.rows)


def _for_rows(tables: Inputs, rows: int) -> dict[str, np.ndarray]:
    """What makes each of so many rows the base's."""
    if TABLE in tables:
        return {**tables, SLOT: np.zeros(rows, dtype=np.int64)}
    return {name: np.repeat(array, rows, axis=0) for name, array in tables.items()}
