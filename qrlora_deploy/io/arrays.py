"""Writing a safetensors file without a second copy of its arrays in memory, to the bytes that the library writes."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

DTYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16"}
"""Names of safetensors by those of numpy, in the order in which tensors are written."""

ALIGNMENT = 8
"""Of the tensors behind the header, which is filled up with blanks."""


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays, the widest type first, and in order of their names.

    Args:
        path: the file.
        arrays: contiguous, of the types in `DTYPES`.
        metadata: texts.

    Raises:
        ValueError: an array is of another type.
        OSError: the disk refuses it.
    """
    ordered = {name: arrays[name] for name in sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, array in ordered.items():
        if array.dtype.str not in DTYPES or not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous and a float, not {array.dtype}")
        end = start + array.nbytes
        header[name] = {"dtype": DTYPES[array.dtype.str], "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in ordered.values():
            file.write(array.reshape(-1).data)
