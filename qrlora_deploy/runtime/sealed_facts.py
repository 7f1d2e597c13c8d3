"""What the sealed files of a bundle say of it. The manifest is not sealed itself and is held against them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from qrlora_deploy.config_file import label_names, read_model_config
from qrlora_deploy.errors import FileFormatError, InputError, library_errors
from qrlora_deploy.reading import parse_json, readable
from qrlora_deploy.runtime.layout import HEAD_TABLE, TABLE, HeadLayout, head_arrays

PADDED_CASES = ("right padding", "left padding", "padding on both sides")
"""The reference batches in which everything under a zero of the mask is padding."""

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class ConfigFacts:
    """From `config.json`.

    Attributes:
        labels: names of the outputs.
        regression: the outputs are numbers, not classes.
    """

    labels: tuple[str, ...]
    regression: bool


@dataclass(frozen=True)
class ReferenceFacts:
    """From the inputs of the reference.

    Attributes:
        max_length: tokens of the longest text, which is as long as the model can take.
        padding: what each text input holds where a row is padded.
        columns: `[total_rank]`, the columns of the coefficient table that customers use, rising; none
            in a merged bundle.
        base_head: the base's row of the head table; empty where there is none.
    """

    max_length: int
    padding: dict[str, frozenset[int]]
    columns: np.ndarray
    base_head: np.ndarray


def read_config_facts(path: Path) -> ConfigFacts:
    """Read `config.json`.

    Raises:
        FileFormatError: it is no model's config.
    """
    config = read_model_config(path)
    labels = tuple(label_names(config, path))
    return ConfigFacts(labels, config.problem_type == "regression" or len(labels) == 1)


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
    table, heads = (tensors.get(f"0.{name}", np.empty((0, 0), dtype=np.float32)) for name in (TABLE, HEAD_TABLE))
    return ReferenceFacts(
        max_length=max(tensors[f"{index}.input_ids"].shape[1] for index in range(len(cases))),
        padding={name: frozenset(values) for name, values in padding.items()},
        columns=np.flatnonzero((table != 0).any(axis=0)),
        base_head=heads[0] if len(heads) else np.empty(0, dtype=np.float32),
    )


def _read_reference(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the cases, and what was put in: text inputs of one shape `[batch, length]` a case, and tables."""
    damaged = f"{path} holds no reference inputs"
    with library_errors(damaged), readable(path), safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
        # By their ends: the tables of the other cases are large.
        names = [name for name in file.keys() if name.endswith(TEXT_INPUTS) or name.startswith("0.")]  # noqa: SIM118
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
    if any(tensors[name].ndim != 2 for name in (f"0.{TABLE}", f"0.{HEAD_TABLE}") if name in tensors):
        raise FileFormatError(f"{damaged}: a table has another shape")
    return cases, tensors


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
