"""A checkpoint's tensors as NumPy sees them: mapped from their files, one at a time, and each counted as used."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.models.weight_files import StoredTensor

DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""By safetensors' names."""

LEFT_OVER = ("rotary_emb.inv_freq", "masked_bias", "lm_head.weight")
"""Ends of the names of tensors that are saved by some and used by nobody; the last one where the head is tied."""


class Tensors:
    """The tensors of a checkpoint by the names that the task model gives them.

    Args:
        stored: what the headers say.
        name: of the checkpoint, for messages.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], name: str) -> None:
        self._stored, self._name = stored, name
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return self._place(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor.

        Raises:
            InputError: there is none of this name.
        """
        return self._stored[self._found(name)].shape

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype; its pages are read when they are used.

        Raises:
            InputError: there is none of this name, or it is quantised.
        """
        place = self._found(name)
        self._used.add(place)
        stored = self._stored[place]
        if stored.quantised:
            raise InputError(f"{self._name}: {place} is stored as {stored.dtype}; give a base in fp32, fp16 or bf16")
        return np.memmap(stored.file, DTYPES[stored.dtype], "r", stored.start, stored.shape)

    def check_all_used(self) -> None:
        """Refuse, by an InputError, a checkpoint with tensors that the graph lacks: it computes something else."""
        unused = sorted(name for name in self._stored if name not in self._used and not name.endswith(LEFT_OVER))
        if unused:
            raise InputError(
                f"{self._name} has {len(unused)} tensors that its family does not, such as {unused[0]}; "
                f"it cannot be exported as a decoder"
            )

    def _found(self, name: str) -> str:
        place = self._place(name)
        if place is None:
            raise InputError(f"{self._name} holds no tensor {name}")
        return place

    def _place(self, name: str) -> str | None:
        # Headless checkpoints lack the prefix.
        return next((place for place in (name, name.removeprefix("model.")) if place in self._stored), None)


STRIP = 16
"""Rows of a matrix that are transposed at once, so that whole cache lines are written."""


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A copy of `matrix.T`, row after row; three times as fast as NumPy's own for matrices larger than the caches."""
    found = np.empty(matrix.shape[::-1], matrix.dtype)
    for first in range(0, len(matrix), STRIP):
        found[:, first : first + STRIP] = matrix[first : first + STRIP].T
    return found
