"""The logits that PyTorch gave, batch by batch, as a bundle carries them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from qrlora_deploy.errors import FileFormatError, library_errors
from qrlora_deploy.io.reading import parse_json, readable
from qrlora_deploy.runtime.bundle.sealed_facts import SEALED

LOGITS, BASE_LOGITS = "logits", "base_logits"
INDEX = "cases"


@dataclass(frozen=True)
class Case:
    """One batch.

    Attributes:
        name: what the batch is about, such as "left padding".
        inputs: int64 `[batch, length]` by input name.
        logits: `[batch, outputs]` or `[batch, length, outputs]` fp32 of the customer in PyTorch, by the side branch.
            What a row does not have is -inf: labels beyond its own, and answers of tokens that are padding.
        base_logits: the same with all coefficients zero.
    """

    name: str
    inputs: dict[str, np.ndarray]
    logits: np.ndarray
    base_logits: np.ndarray


def without_padding(logits: np.ndarray, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The same logits, -inf where a token is padding: nobody reads what a model says of it.

    Args:
        logits: `[batch, length, outputs]`; `[batch, outputs]` are left as they are.
        inputs: of the batch.
    """
    if logits.ndim < 3:
        return logits
    hidden = np.array(-np.inf, dtype=logits.dtype)
    return np.where((inputs["attention_mask"] != 0)[:, :, None], logits, hidden)


def write_reference(reference: Sequence[Case], path: Path, sealed: dict[str, Any]) -> None:
    """Write the cases, and what the manifest will say, into a folder that is not yet in use; it seals the file."""
    tensors = {SEALED: np.frombuffer(json.dumps(sealed, sort_keys=True).encode(), dtype=np.uint8)}
    for index, case in enumerate(reference):
        arrays = case.inputs | {LOGITS: case.logits, BASE_LOGITS: case.base_logits}
        tensors.update({f"{index}.{name}": np.ascontiguousarray(array) for name, array in arrays.items()})
    names = json.dumps([case.name for case in reference])
    path.write_bytes(safetensors.numpy.save(tensors, {INDEX: names}))


def read_reference(path: Path) -> list[Case]:
    """Read the cases of a bundle.

    Raises:
        FileFormatError: the file is damaged.
    """
    damaged = f"{path} holds no reference logits"
    with library_errors(damaged), readable(path), safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    names = parse_json((metadata or {}).get(INDEX, ""), damaged)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise FileFormatError(f"{damaged}: its cases have no names")
    return [_case(tensors, index, name, damaged) for index, name in enumerate(names)]


def _case(tensors: dict[str, np.ndarray], index: int, name: str, damaged: str) -> Case:
    prefix = f"{index}."
    arrays = {key.removeprefix(prefix): array for key, array in tensors.items() if key.startswith(prefix)}
    missing = [key for key in (LOGITS, BASE_LOGITS) if key not in arrays]
    if missing:
        raise FileFormatError(f"{damaged}: the case {name} has no {' and no '.join(missing)}")
    return Case(name, logits=arrays.pop(LOGITS), base_logits=arrays.pop(BASE_LOGITS), inputs=arrays)
