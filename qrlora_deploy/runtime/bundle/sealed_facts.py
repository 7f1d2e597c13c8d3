"""What the sealed files of a bundle say of it. The manifest is not sealed itself and is held against them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from qrlora_deploy.errors import FileFormatError, InputError, library_errors
from qrlora_deploy.formats.config_file import label_names, read_model_config
from qrlora_deploy.io.reading import parse_json, read_text, readable
from qrlora_deploy.runtime.bundle.row_layout import (
    BASE_HEAD_FILE,
    COEFFICIENTS,
    HEAD,
    TABLE_OF,
    HeadLayout,
    head_arrays,
)
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.registry import task_of_config

CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
REFERENCE_FILE = "reference.safetensors"

SEALED = "sealed"
"""A tensor of the reference, uint8: JSON of the manifest's fields that decide an answer. It is no second entry
of the metadata, which safetensors writes in an order that differs from process to process."""

MAX_CONFIG_BYTES = 16 * 2**20

PADDED_CASES = ("right padding", "left padding", "padding on both sides")
"""The reference batches in which everything under a zero of the mask is padding."""

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class ConfigFacts:
    """From `config.json`.

    Attributes:
        labels: names of the outputs.
        thresholds: of the outputs; empty where there are none.
        task: of its head.
        token_rows: token ids that the embedding has a row for; None where the config does not say.
        segment_rows: the same of segment ids; None where there are none.
    """

    labels: tuple[str, ...]
    thresholds: tuple[float, ...]
    task: Task
    token_rows: int | None
    segment_rows: int | None


@dataclass(frozen=True)
class ReferenceFacts:
    """From the inputs of the reference.

    Attributes:
        max_length: tokens of the longest text.
        padding: what each text input holds where a row is padded.
        columns: `[total_rank]`, the columns of the coefficient table that customers use, rising; none
            in a merged bundle.
        base_head: the base's row of the head table; empty where there is none.
        sealed: fields of the manifest as they were at the export; empty in bundles of earlier versions.
    """

    max_length: int
    padding: dict[str, frozenset[int]]
    columns: np.ndarray
    base_head: np.ndarray
    sealed: dict[str, Any]


def read_config_facts(path: Path) -> ConfigFacts:
    """Read `config.json`.

    Raises:
        FileFormatError: it is no model's config.
    """
    config = read_model_config(path)
    labels = tuple(label_names(config, path))
    task = task_of_config(config.problem_type, len(labels), config.architecture, config.qrlora_task)
    return ConfigFacts(
        labels if task.has_labels else (),
        tuple(config.qrlora_thresholds or ()),
        task,
        _rows(config.vocab_size),
        _rows(config.type_vocab_size),
    )


def _rows(size: int | None) -> int | None:
    return size if size is not None and size > 0 else None


def read_padding_side(folder: Path) -> str | None:
    """The side that a tokenizer's own config names; None where it names none or is not there.

    Raises:
        FileFormatError: it is no JSON.
    """
    path = folder / TOKENIZER_CONFIG_FILE
    if not path.is_file():
        return None
    record = parse_json(read_text(path, MAX_CONFIG_BYTES), f"{path} is not JSON")
    side = record.get("padding_side") if isinstance(record, dict) else None
    return side if side in ("left", "right") else None


def read_reference_facts(path: Path) -> ReferenceFacts:
    """Read the inputs, not the logits, of the reference.

    Raises:
        FileFormatError: the file is damaged.
    """
    cases, tensors = _read_reference(path)
    padding: dict[str, set[int]] = {}
    for index in (index for index, case in enumerate(cases) if case in PADDED_CASES):
        free = tensors[f"{index}.attention_mask"] == 0
        for name in ("input_ids", "token_type_ids"):
            if f"{index}.{name}" in tensors:
                padding.setdefault(name, set()).update(np.unique(tensors[f"{index}.{name}"][free]).tolist())
    table, heads = (_numbers(tensors, name) for name in (COEFFICIENTS, HEAD))
    if len(heads) and f"0.{HEAD}" in tensors:
        # Without a table the base's rows are those without coefficients.
        heads = heads[np.argsort((table != 0).any(axis=1), kind="stable")]
    return ReferenceFacts(
        max_length=max(tensors[f"{index}.input_ids"].shape[1] for index in range(len(cases))),
        padding={name: frozenset(values) for name, values in padding.items()},
        columns=np.flatnonzero((table != 0).any(axis=0)),
        base_head=heads[0] if len(heads) else np.empty(0, dtype=np.float32),
        sealed=_sealed(tensors, path),
    )


def _numbers(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """What customers brought, `[customers, width]`: a table, or the rows of all cases; `[0, 0]` where they did not."""
    count = sum(key.endswith(f".{name}") for key in tensors)
    if count:
        return np.concatenate([tensors[f"{index}.{name}"] for index in range(count)])
    return tensors.get(f"0.{TABLE_OF[name]}", np.empty((0, 0), dtype=np.float32))


def _sealed(tensors: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    if SEALED not in tensors:
        return {}
    damaged = f"{path} does not repeat the manifest"
    with library_errors(damaged):
        text = tensors[SEALED].tobytes().decode()
    record = parse_json(text, damaged)
    if not isinstance(record, dict) or not record:
        raise FileFormatError(f"{damaged}: it holds something else")
    return record


def _read_reference(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the cases, and what was put in: text inputs of one shape `[batch, length]` a case, and tables."""
    damaged = f"{path} holds no reference inputs"
    with library_errors(damaged), readable(path), safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
        # By their ends: the tables of the other cases are large.
        ends = (*TEXT_INPUTS, SEALED, *(f".{name}" for name in TABLE_OF))
        names = [name for name in file.keys() if name.endswith(ends) or name.startswith("0.")]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    cases = parse_json((metadata or {}).get("cases", ""), damaged)
    if not isinstance(cases, list) or not cases or not all(isinstance(case, str) for case in cases):
        raise FileFormatError(f"{damaged}: its cases have no names")
    for index in range(len(cases)):
        inputs = [tensors.get(f"{index}.{name}") for name in TEXT_INPUTS]
        shapes = {None if array is None else array.shape for array in inputs[:2]}
        shapes |= {array.shape for array in inputs[2:] if array is not None}
        if len(shapes) != 1 or any(shape is None or len(shape) != 2 for shape in shapes):
            raise FileFormatError(f"{damaged}: its case {index} has inputs of other shapes")
    if any(tensors[name].ndim != 2 for name in (f"0.{table}" for table in TABLE_OF.values()) if name in tensors):
        raise FileFormatError(f"{damaged}: a table has another shape")
    _check_numbers(tensors, len(cases), damaged)
    return cases, tensors


def _check_numbers(tensors: dict[str, np.ndarray], cases: int, damaged: str) -> None:
    """Make sure that what customers brought in each row of a case has a row for each, and one width."""
    for name in TABLE_OF:
        found = {index: tensors[f"{index}.{name}"] for index in range(cases) if f"{index}.{name}" in tensors}
        fits = all(
            array.ndim == 2 and len(array) == len(tensors[f"{index}.input_ids"]) for index, array in found.items()
        )
        if found and not (fits and len(found) == cases and len({array.shape[1] for array in found.values()}) == 1):
            raise FileFormatError(f"{damaged}: its {name} have another shape")


def read_head_row(path: Path, layout: HeadLayout) -> np.ndarray:
    """The output layer in a file as a row `[width]` of the head table, fp32.

    Raises:
        FileFormatError: it holds no such layer.
    """
    with library_errors(f"{path} holds no head"), readable(path):
        tensors = safetensors.numpy.load_file(path)
    try:
        return layout.row(*head_arrays(tensors))
    except InputError as error:
        raise FileFormatError(f"{path} holds no head: {error}") from error


def read_base_head(folder: Path, layout: HeadLayout, labels: int) -> np.ndarray:
    """The output layer of the base in a bundle's folder as a row `[width]` of the head table, fp32.

    Raises:
        FileFormatError: there is none, or it has not so many labels as the base.
    """
    path = folder / BASE_HEAD_FILE
    row = read_head_row(path, layout)
    # Where there is no label the bias is -inf.
    found = int(np.isfinite(row[-layout.labels :]).sum())
    if found != labels:
        raise FileFormatError(f"{path} has a head for {found} of {labels} labels")
    return row
