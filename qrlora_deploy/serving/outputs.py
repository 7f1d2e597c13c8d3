"""The tensors that answers are given in, whatever the protocol."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qrlora_deploy.serving.engine.rows import RowAnswer
from qrlora_deploy.tasks.base import Task

PADDING = {"FP32": float(np.finfo(np.float32).min), "FP16": float(np.finfo(np.float16).min)}
"""Stands in `logits` behind the labels of a row that has fewer than others of its request: the lowest finite
number, of which JSON knows, and of which no argmax and no softmax takes notice."""

NO_SCORE, NO_LABEL = 0.0, ""
"""The same in `scores` and in `labels`."""


def logits(answers: Sequence[RowAnswer], task: Task) -> np.ndarray:
    """What the model gave, fp32 `[n, labels]`, padded by the lowest number."""
    return _padded([answer.logits for answer in answers], PADDING["FP32"])


def scores(answers: Sequence[RowAnswer], task: Task) -> np.ndarray:
    """What the task makes of them, such as probabilities: fp32 `[n, labels]`, padded by 0."""
    return _padded([task.scores(answer.logits) for answer in answers], NO_SCORE)


def labels(answers: Sequence[RowAnswer], task: Task) -> np.ndarray:
    """Names of the columns of `logits` and `scores` in each row: texts `[n, labels]`, padded by empty ones."""
    width = max(len(answer.labels) for answer in answers)
    found = np.full((len(answers), width), NO_LABEL, dtype=object)
    for row, answer in enumerate(answers):
        found[row, : len(answer.labels)] = answer.labels
    return found


def label(answers: Sequence[RowAnswer], task: Task) -> np.ndarray:
    """The name of the most likely one: texts `[n]`."""
    return np.array([answer.answering.answer(task, answer.logits).label for answer in answers], dtype=object)


def embeddings(answers: Sequence[RowAnswer], task: Task) -> np.ndarray:
    """The vector of each text, of a task without labels: fp32 `[n, width]`."""
    return np.array([answer.logits for answer in answers], dtype=np.float32)


def digest(answers: Sequence[RowAnswer], task: Task) -> np.ndarray:
    """Of the content of the customer that answered; empty for the base: texts `[n]`."""
    return np.array([answer.digest for answer in answers], dtype=object)


def _padded(rows: Sequence[np.ndarray], fill: float) -> np.ndarray:
    width = max(len(row) for row in rows)
    if all(len(row) == width for row in rows):
        return np.array(rows, dtype=np.float32)
    found = np.full((len(rows), width), fill, dtype=np.float32)
    for number, row in enumerate(rows):
        found[number, : len(row)] = row
    return found


Output = Callable[[Sequence[RowAnswer], Task], np.ndarray]

OUTPUTS: Mapping[str, Output] = {
    "logits": logits,
    "scores": scores,
    "labels": labels,
    "label": label,
    "embeddings": embeddings,
    "digest": digest,
}
"""By the name that a request chooses them by."""

DATATYPES = dict.fromkeys(OUTPUTS, "BYTES") | dict.fromkeys(("logits", "scores", "embeddings"), "FP32")
"""As the protocol calls them."""


def outputs_of(task: Task) -> tuple[str, ...]:
    """Names of the outputs that a task has; none where each word has an answer: those are no tensors."""
    if task.answers_words:
        return ()
    return ("logits", "scores", "labels", "label", "digest") if task.has_labels else ("embeddings", "digest")


def answer_parameters(base_digest: str, answers: Sequence[RowAnswer]) -> dict[str, str]:
    """What has answered: digests of the base, and of the customer where all rows are of one."""
    digests = {answer.digest for answer in answers}
    parameters = {"base_digest": base_digest}
    if len(digests) == 1:
        parameters["customer_digest"] = digests.pop()
    return parameters
