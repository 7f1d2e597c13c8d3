"""Tensors of the Open Inference Protocol: as JSON, and as its binary extension has them."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from qrlora_deploy.errors import MalformedInputError

DTYPES: dict[str, str] = {
    "BOOL": "?",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
"""NumPy's types, little-endian, by the protocol's names."""

NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

LENGTH = struct.Struct("<I")
"""Before each text in binary."""

Input = np.ndarray | Sequence[Any]
"""A tensor to send: an array, or lists of texts or numbers."""


def as_array(name: str, value: Input) -> np.ndarray:
    """A tensor as an array, numbers little-endian and in row order, texts as objects.

    Raises:
        MalformedInputError: the protocol has no such type, or it is no tensor.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise MalformedInputError(f"the input {name!r} has rows of several lengths; pad them") from error
    # An empty list has no type; texts are what most inputs are.
    if array.dtype.kind in "UTO" or (array.size == 0 and not isinstance(value, np.ndarray)):
        return _texts(name, np.asarray(value, dtype=object))
    little = array.dtype.newbyteorder("<")
    if little not in NAMES:
        raise MalformedInputError(f"the input {name!r} is of {array.dtype}; give texts, integers, or fp16 to fp64")
    return np.ascontiguousarray(array, dtype=little)


def _texts(name: str, array: np.ndarray) -> np.ndarray:
    if not all(isinstance(item, str) for item in array.flat):
        raise MalformedInputError(f"the input {name!r} holds something that is neither a number nor a text")
    return array


def datatype_of(array: np.ndarray) -> str:
    """What the protocol calls the type of what `as_array` gave."""
    return "BYTES" if array.dtype == object else NAMES[array.dtype]


def to_binary(array: np.ndarray) -> bytes:
    """The bytes of what `as_array` gave.

    Raises:
        MalformedInputError: a text holds half of a character.
    """
    if array.dtype != object:
        return array.tobytes()
    try:
        texts = [text.encode() for text in array.flat]
    except UnicodeEncodeError as error:
        raise MalformedInputError("a text holds half of a surrogate pair") from error
    return b"".join(part for text in texts for part in (LENGTH.pack(len(text)), text))


def from_binary(datatype: str, shape: Sequence[int], raw: memoryview) -> np.ndarray:
    """A tensor from its bytes.

    Raises:
        ValueError: the bytes are more or fewer than its shape says, or texts are not UTF-8.
        KeyError: there is no such datatype.
    """
    if datatype != "BYTES":
        return np.frombuffer(raw, dtype=DTYPES[datatype]).reshape(shape)
    texts, start = [], 0
    while start < len(raw):
        begin = start + LENGTH.size
        if begin > len(raw):
            raise ValueError("a text is cut")
        start = begin + LENGTH.unpack(raw[begin - LENGTH.size : begin])[0]
        if start > len(raw):
            raise ValueError("a text is cut")
        texts.append(bytes(raw[begin:start]).decode())
    return _objects(texts, shape)


def from_json(datatype: str, shape: Sequence[int], data: Any) -> np.ndarray:
    """A tensor from the lists of its JSON, which may be flat or nested.

    Raises:
        ValueError: they do not fit the shape or the datatype.
        KeyError: there is no such datatype.
        OverflowError: a number or a size is beyond what NumPy has.
    """
    values = np.asarray(data, dtype=object)
    if datatype == "BYTES":
        texts = values.ravel().tolist()
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a text is none")
        return _objects(texts, shape)
    dtype = np.dtype(DTYPES[datatype])
    allowed = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}[dtype.kind]
    if not set(map(type, values.flat)).issubset(allowed):
        raise ValueError("a number is none")
    array = values.astype(dtype)
    if dtype.kind in "iu" and (array != values).any():
        raise ValueError("a number is beyond its datatype")
    return array.reshape(shape)


def _objects(texts: list[str], shape: Sequence[int]) -> np.ndarray:
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array.reshape(shape)
