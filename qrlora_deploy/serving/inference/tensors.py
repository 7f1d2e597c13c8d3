"""Tensors of the Open Inference Protocol v2, in JSON and in its binary extension. Pure: bytes in, arrays out.

Whatever is wrong with what a client sent is a `MalformedInputError` that names the tensor.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from qrlora_deploy.errors import MalformedInputError, QrloraError
from qrlora_deploy.serving.outputs import PADDING

MAX_DIMENSIONS = 8

MAX_ELEMENTS = 2**31
"""No body is long enough for more; beside a size of 0 a shape could say anything, and numpy refuses what overflows."""

PIECE = 1 << 15
"""Numbers of JSON that are read at once, some milliseconds of work: in between others may have the interpreter."""

LENGTH = struct.Struct("<I")
"""Before each element of BYTES in binary data."""

RAW: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "FP32": np.dtype("<f4"), "FP16": np.dtype("<f2")}
"""Datatypes of fixed size, little-endian, as binary data has them."""


def check_shape(shape: Any, place: str) -> tuple[int, ...]:
    """The shape of a tensor.

    Raises:
        MalformedInputError: it is none.
    """
    sizes = shape if isinstance(shape, list) else []
    whole = all(type(size) is int and size >= 0 for size in sizes)
    if not sizes or len(sizes) > MAX_DIMENSIONS or not whole:
        raise MalformedInputError(f"{place}: shape must be a list of 1 to {MAX_DIMENSIONS} whole numbers from 0 up")
    if math.prod(size or 1 for size in sizes) > MAX_ELEMENTS:
        raise MalformedInputError(f"{place}: the shape is beyond {MAX_ELEMENTS} elements, which no body holds")
    return tuple(sizes)


def numbers_of_json(data: Any, shape: tuple[int, ...], place: str) -> np.ndarray:
    """INT64 from `data`, flat or nested.

    Raises:
        MalformedInputError: it is no list of whole numbers of 64 bits, or of another size than the shape.
    """
    rows = data if isinstance(data, list) else [data]
    step = max(1, PIECE // _elements(rows[0])) if rows else 1
    pieces = [_numbers(rows[start : start + step], shape, place) for start in range(0, len(rows), step)]
    try:
        array = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    except ValueError as error:
        raise _no_numbers(place, shape) from error
    if array.size != math.prod(shape):
        raise _wrong_size(place, array.size, shape)
    return array.reshape(shape)


def _elements(item: Any) -> int:
    """How many elements an item of a list has, if those within it are all alike; at least 1."""
    count = 1
    while isinstance(item, list) and item:
        count, item = count * len(item), item[0]
    return count


def _numbers(rows: list[Any], shape: tuple[int, ...], place: str) -> np.ndarray:
    """A piece of `data` as INT64, as deep as it is nested."""
    try:
        # As objects: of one long text among many elements numpy's own choice would make all as long.
        array = np.asarray(rows, dtype=object)
    # numpy says by either that lists are ragged or too deep.
    except (ValueError, RecursionError) as error:
        raise _no_numbers(place, shape) from error
    if not set(map(type, array.flat)) <= {int}:
        raise MalformedInputError(f"{place}: data must hold whole numbers of 64 bits alone")
    try:
        return array.astype(np.int64)
    except OverflowError as error:
        raise MalformedInputError(f"{place}: data must hold whole numbers of 64 bits alone") from error


def _no_numbers(place: str, shape: tuple[int, ...]) -> MalformedInputError:
    return MalformedInputError(f"{place}: data is not a list of numbers of the shape {list(shape)}")


def texts_of_json(data: Any, shape: tuple[int, ...], place: str) -> list[str]:
    """Texts from `data`, flat or nested.

    Raises:
        MalformedInputError: it holds something else, or another number of them.
    """
    flat = data if isinstance(data, list) else [data]
    for _ in shape[1:]:
        if any(isinstance(item, list) for item in flat):
            flat = [item for part in flat for item in (part if isinstance(part, list) else [part])]
    if not all(isinstance(item, str) for item in flat):
        raise MalformedInputError(f"{place}: data of BYTES must be a list of texts")
    if len(flat) != math.prod(shape):
        raise _wrong_size(place, len(flat), shape)
    return flat


def numbers_of_bytes(raw: memoryview, shape: tuple[int, ...], place: str) -> np.ndarray:
    """INT64 from binary data.

    Raises:
        MalformedInputError: it has another size than the shape.
    """
    dtype = RAW["INT64"]
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise MalformedInputError(f"{place}: {len(raw)} bytes are not INT64 of the shape {list(shape)}")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def texts_of_bytes(raw: memoryview, shape: tuple[int, ...], place: str) -> list[str]:
    """Texts from binary data: each begins with its length in four bytes.

    Raises:
        MalformedInputError: the lengths do not fit the data or the shape, or a text is not UTF-8.
    """
    count, start = math.prod(shape), 0
    found: list[str] = []
    # No loop over a number that a client made up: each text takes four bytes.
    while start < len(raw) and len(found) <= count:
        end = start + LENGTH.size
        if end > len(raw):
            raise MalformedInputError(f"{place}: the binary data ends within a length")
        start, end = end, end + LENGTH.unpack_from(raw, start)[0]
        if end > len(raw):
            raise MalformedInputError(f"{place}: text {len(found)} is longer than the binary data")
        found.append(text_of(raw[start:end], len(found), place))
        start = end
    if len(found) != count:
        raise _wrong_size(place, len(found), shape)
    return found


def text_of(raw: memoryview | bytes, number: int, place: str) -> str:
    """A text from its bytes.

    Raises:
        MalformedInputError: they are not UTF-8.
    """
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise MalformedInputError(f"{place}: text {number} is not UTF-8") from error


def _wrong_size(place: str, found: int, shape: Sequence[int]) -> MalformedInputError:
    return MalformedInputError(f"{place}: the shape {list(shape)} is not that of {found} elements")


def to_json(values: np.ndarray, name: str) -> np.ndarray | list[Any]:
    """An output as flat `data`, for orjson, which writes fp32 with as many digits as it has.

    Raises:
        QrloraError: it holds NaN or an infinite number, for which JSON has no word; null would hide it.
    """
    if values.dtype != object and not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise QrloraError(
            f"row {row} of {name} is not finite, which JSON cannot say; ask for binary data to see it, and verify "
            f"the customer"
        )
    return values.ravel().tolist() if values.dtype == object else np.ascontiguousarray(values.ravel())


def to_bytes(values: np.ndarray, datatype: str) -> bytes:
    """An output as binary data."""
    if datatype == "BYTES":
        encoded = [text.encode() for text in values.ravel()]
        return b"".join(part for text in encoded for part in (LENGTH.pack(len(text)), text))
    with np.errstate(over="ignore"):
        found = values.astype(RAW[datatype])
    found[values == PADDING["FP32"]] = PADDING[datatype]
    return found.tobytes()
