"""What the sealed files of a bundle say of it. The manifest is not sealed itself and is held against them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.runtime.layout import HEAD_TABLE, TABLE, HeadLayout, head_arrays

UNNAMED_LABELS = ("LABEL_0", "LABEL_1")
"""The labels of a config that names none: transformers leaves its own defaults out of the file."""

PADDED_CASES = ("right padding", "left padding", "padding on both sides")
"""The reference batches in which everything under a zero of the mask is padding."""

MAX_CONFIG_BYTES = 16 * 2**20


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
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise FileFormatError(f"{path} is too large for a config")
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        names = config.get("id2label")
        labels = UNNAMED_LABELS if names is None else tuple(str(names[str(index)]) for index in range(len(names)))
        regression = config.get("problem_type") == "regression" or len(labels) == 1
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise FileFormatError(f"{path} is no model's config: {type(error).__name__}") from error
    return ConfigFacts(labels, regression)


def read_reference_facts(path: Path) -> ReferenceFacts:
    """Read the inputs, not the logits, of the reference.

    Raises:
        FileFormatError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            cases = json.loads((file.metadata() or {})["cases"])
            stored = set(file.keys())
            lengths = [int(file.get_slice(f"{index}.input_ids").get_shape()[1]) for index in range(len(cases))]
            padding: dict[str, set[int]] = {}
            for index in (index for index, case in enumerate(cases) if case in PADDED_CASES):
                free = file.get_tensor(f"{index}.attention_mask") == 0
                for name in ("input_ids", "token_type_ids"):
                    if f"{index}.{name}" in stored:
                        values = file.get_tensor(f"{index}.{name}")[free]
                        padding.setdefault(name, set()).update(np.unique(values).tolist())
            table, heads = (_table(file, f"0.{name}", stored) for name in (TABLE, HEAD_TABLE))
        return ReferenceFacts(
            max_length=max(lengths),
            padding={name: frozenset(values) for name, values in padding.items()},
            columns=np.flatnonzero((table != 0).any(axis=0)),
            base_head=heads[0] if len(heads) else np.empty(0, dtype=np.float32),
        )
    except (safetensors.SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{path} holds no reference inputs: {type(error).__name__}") from error


def read_head_row(path: Path, layout: HeadLayout) -> np.ndarray:
    """The output layer in a file as a row `[width]` of the head table, fp32.

    Raises:
        FileFormatError: it holds no such layer.
    """
    try:
        return layout.row(*head_arrays(safetensors.numpy.load_file(path)))
    except (safetensors.SafetensorError, OSError, InputError) as error:
        raise FileFormatError(f"{path} holds no head: {error}") from error


def _table(file: Any, name: str, stored: set[str]) -> np.ndarray:
    """A table of the first case `[slots, width]`; empty where the reference has none."""
    return file.get_tensor(name) if name in stored else np.empty((0, 0), dtype=np.float32)
