"""Safetensors files without a second copy of their arrays in memory: written to the bytes that the library writes, and
mapped; and arrays that lie on the disk until they are wanted."""

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


def on_disk(array: np.ndarray, path: Path) -> np.ndarray:
    """The same array in a new file, of which only what is looked at is in memory.

    Args:
        array: contiguous.
        path: the file, which may be removed while the array is in use, but on Windows.

    Raises:
        OSError: the disk refuses it.
    """
    with path.open("wb") as file:
        file.write(array.reshape(-1).data)
    return np.memmap(path, array.dtype, "c", shape=array.shape)


def mapped_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a whole safetensors file of fp32, of which only what is looked at is in memory."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "c", offset=8 + length)
    header.pop("__metadata__", None)
    return {
        name: data[slice(*part["data_offsets"])].view(np.float32).reshape(part["shape"])
        for name, part in header.items()
    }
