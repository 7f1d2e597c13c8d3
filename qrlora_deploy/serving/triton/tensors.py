"""The inputs and outputs of the front, by the names of the server's protocol; each has a row for each text."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.runtime.bundle.bundle import Manifest
from qrlora_deploy.serving.engine.rows import RowAnswer
from qrlora_deploy.serving.inference.questions import CUSTOMER, PAIR, TEXT
from qrlora_deploy.serving.outputs import DATATYPES, OUTPUTS, outputs_of
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.registry import task_named

SPANS = "spans"
"""Output of a task that answers words: for each text JSON, a list of what was found with its place."""


def front_inputs(manifest: Manifest) -> dict[str, bool]:
    """Names of the inputs, BYTES `[n, 1]` each, and whether one may be left out."""
    task = task_named(manifest.task)
    if task.answers_words or task.pairs_apart:
        return {TEXT: False, CUSTOMER: True}
    return {TEXT: False, PAIR: not task.needs_pairs, CUSTOMER: True}


def front_outputs(manifest: Manifest) -> dict[str, tuple[str, int]]:
    """Datatype and columns of each output, by its name; -1 columns: as many as the request's customers have labels."""
    task = task_named(manifest.task)
    names = (SPANS, "digest") if task.answers_words else outputs_of(task)
    columns = {"embeddings": manifest.width, "logits": -1, "scores": -1, "labels": -1}
    return {name: (DATATYPES.get(name, "BYTES"), columns.get(name, 1)) for name in names}


def texts_of(array: np.ndarray, name: str) -> list[str]:
    """The texts of a BYTES tensor `[n, 1]`, as the backend gives it.

    Raises:
        MalformedInputError: it has another shape or holds no UTF-8.
    """
    if array.ndim != 2 or array.shape[1] != 1:
        raise MalformedInputError(f"the input {name} must have the shape [rows, 1], not {list(array.shape)}")
    try:
        return [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in array[:, 0].tolist()]
    except UnicodeDecodeError as error:
        raise MalformedInputError(f"the input {name} holds a text that is not UTF-8") from error


def output_array(name: str, answers: Sequence[RowAnswer], task: Task) -> np.ndarray:
    """An output `[n, columns]`: fp32, or an object array of bytes."""
    found = _spans(answers, task) if name == SPANS else OUTPUTS[name](answers, task)
    rows = found.reshape(len(answers), -1)
    if rows.dtype != object:
        return np.ascontiguousarray(rows)
    encoded = np.empty(rows.shape, dtype=object)
    encoded[...] = [[text.encode("utf-8") for text in row] for row in rows.tolist()]
    return encoded


def _spans(answers: Sequence[RowAnswer], task: Task) -> np.ndarray:
    found = np.empty(len(answers), dtype=object)
    for number, given in enumerate(answers):
        answer = given.answering.answer(task, given.logits, given.words)
        found[number] = json.dumps([asdict(span) for span in answer.spans])
    return found
