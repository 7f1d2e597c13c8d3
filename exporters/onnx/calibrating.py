"""The texts that the scales of an int8 graph's activations are measured on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from exporters.onnx.prepared import Prepared
from qrlora_deploy.data.cutting import cut_texts
from qrlora_deploy.data.examples import TextRows
from qrlora_deploy.runtime.bundle.manifest_parts import CalibrationRecord
from qrlora_deploy.runtime.bundle.row_layout import HEAD_TABLE, SLOT, TABLE
from qrlora_deploy.tasks.base import Task

MAX_ROWS = 128
"""Rows that are run. With 32, 128 and 256 a trained MiniLM keeps the same share of its customers' effect."""

DESCRIPTION = "calibration"

Inputs = dict[str, np.ndarray]


def texts_to_calibrate(texts: TextRows | None, task: Task) -> TextRows | None:
    """The texts as the task reads them: those of pairs one by one, where it reads them so; None: there are none."""
    if texts is None or texts.pairs is None or not task.pairs_apart:
        return texts
    return TextRows([text for pair in zip(texts.texts, texts.pairs, strict=True) for text in pair], None, texts.name)


def choose_rows(texts: TextRows) -> TextRows:
    """At most `MAX_ROWS`, spread evenly over the data."""
    chosen = np.linspace(0, len(texts.texts) - 1, min(len(texts.texts), MAX_ROWS)).round().astype(int)
    pairs = [texts.pairs[row] for row in chosen] if texts.pairs is not None else None
    return TextRows([texts.texts[row] for row in chosen], pairs, texts.name)


def calibration_record(texts: TextRows) -> CalibrationRecord:
    """What the manifest says of the rows that `calibration_inputs` takes of `texts`."""
    rows, digest = choose_rows(texts), hashlib.sha256()
    pairs: Sequence[str | None] = rows.pairs or [None] * len(rows.texts)
    for row in zip(rows.texts, pairs, strict=True):
        digest.update(json.dumps(row).encode())
    # As `quantizing` makes a scale of what the rows give.
    return CalibrationRecord(method="minmax", rows=len(rows.texts), texts_digest=digest.hexdigest())


def calibration_inputs(
    prepared: Prepared,
    texts: TextRows,
    customers: Mapping[str, np.ndarray],
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Inputs]:
    """Inputs of one text at a time, those of `choose_rows`.

    Nothing is padded, because nobody attends to padding, and its activations would widen the ranges.

    Args:
        prepared: the base.
        texts: at least one.
        customers: inputs of a batch that the graph is checked with. Of a switchable graph its tables
            are taken, and each text belongs to the next customer in them; a merged one has none.
        progress: called with a description, the rows done and all rows.
    """
    tokenizer, length = prepared.tokenizer, prepared.max_tokens
    tables = {name: customers[name] for name in (TABLE, HEAD_TABLE) if name in customers}
    rows = choose_rows(texts)
    for index, text in enumerate(rows.texts):
        pair = [rows.pairs[index]] if rows.pairs is not None else None
        first, pair = cut_texts(tokenizer, [text], pair, length)
        encoded = tokenizer(first, pair, truncation=True, max_length=length, return_tensors="np")
        inputs = {name: encoded[name].astype(np.int64) for name in prepared.input_names}
        if tables:
            inputs |= tables | {SLOT: np.array([index % len(tables[TABLE])], dtype=np.int64)}
        yield inputs
        if progress is not None:
            progress(DESCRIPTION, index + 1, len(rows.texts))
