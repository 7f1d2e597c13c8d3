"""Where an ONNX file keeps its weights, read without the `onnx` package.

A serving host has only ONNX Runtime, which opens whatever path the file names. So the few message
types that can hold a tensor are walked here, in protobuf's wire format, before it gets the file.
"""

from collections.abc import Iterator

from qrlora_deploy.errors import FileFormatError

# Message type -> field number -> message type, from onnx.proto: every way to a TensorProto.
FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
KEY, VALUE = 1, 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_DEPTH = 64


def external_locations(model: bytes) -> set[str]:
    """Every `location` that a tensor of the serialised model names.

    Raises:
        FileFormatError: the bytes are no protobuf message or are nested too deep.
    """
    try:
        return set(_walk(memoryview(model), "model", 0))
    except (IndexError, UnicodeDecodeError) as error:
        raise FileFormatError("the file is cut or is not an ONNX model") from error


def _walk(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise FileFormatError("the ONNX model is nested too deep")
    known = FIELDS[kind]
    for field, part in _fields(message):
        inner = known.get(field)
        if inner == "entry":
            entry = {number: bytes(value).decode() for number, value in _fields(part)}
            if entry.get(KEY) == "location":
                yield entry.get(VALUE, "")
        elif inner is not None:
            yield from _walk(part, inner, depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of one message; others are skipped."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        field, wire = tag >> 3, tag & 7
        if wire == VARINT:
            _, position = _varint(message, position)
        elif wire in (FIXED64, FIXED32):
            position += 8 if wire == FIXED64 else 4
        elif wire == BYTES:
            size, position = _varint(message, position)
            yield field, message[position : position + size]
            position += size
        else:
            raise FileFormatError("the file is not an ONNX model")
    if position != len(message):
        raise IndexError("the last field is cut")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise IndexError("a number is too long")
