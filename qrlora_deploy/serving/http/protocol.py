"""Requests and answers of the Open Inference Protocol v2. Pure: bytes in, dataclasses out, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.serving.inference.requests import (
    MAX_TENSORS,
    InferRequest,
    Tensor,
    Wanted,
    checked_parameters,
    chosen_outputs,
)
from qrlora_deploy.serving.inference.tensors import (
    check_shape,
    numbers_of_bytes,
    numbers_of_json,
    texts_of_bytes,
    texts_of_json,
    to_bytes,
    to_json,
)


@dataclass(frozen=True)
class InferAnswer:
    """What goes back: the JSON, and binary data behind it.

    Attributes:
        body: all of it.
        header_length: bytes of the JSON, where binary data follows; None: nothing does.
    """

    body: bytes
    header_length: int | None = None


def parse_infer(body: bytes, header_length: int | None, names: Sequence[str]) -> InferRequest:
    """Parse a request.

    Args:
        body: JSON, and the binary data of its inputs behind it.
        header_length: bytes of the JSON; None: all of it.
        names: of the outputs that the model has.

    Raises:
        MalformedInputError: it is none; the line says what is wrong.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise MalformedInputError(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes")
    record = parse_object(body if header_length is None else body[:header_length])
    parameters = checked_parameters(record.get("parameters"), "the request")
    identity = record.get("id", "")
    if not isinstance(identity, str):
        raise MalformedInputError("id must be a text")
    outputs = _objects(record, "outputs") if record.get("outputs") else []
    binary = memoryview(body)[len(body) if header_length is None else header_length :]
    return InferRequest(identity, parameters, _inputs(record, binary), chosen_outputs(outputs, parameters, names))


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        MalformedInputError: it is none.
    """
    try:
        record = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedInputError(f"the body is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise MalformedInputError("the body must be a JSON object")
    return record


def _objects(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A list of objects that have a name each, no two the same one."""
    found = record.get(name)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found) or len(found) > MAX_TENSORS:
        raise MalformedInputError(f"{name} must be a list of objects, {MAX_TENSORS} at most")
    names = [item.get("name") for item in found]
    if not all(isinstance(item, str) for item in names) or len(set(names)) < len(names):
        raise MalformedInputError(f"each of {name} must have a name of its own")
    return found


def _inputs(record: Mapping[str, Any], binary: memoryview) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    start = 0
    for item in _objects(record, "inputs"):
        place = f"input {item['name']!r:.60}"
        size = checked_parameters(item.get("parameters"), place).get("binary_data_size")
        if size is None:
            found[item["name"]] = _from_json(item, place)
            continue
        if type(size) is not int or not 0 <= size <= len(binary) - start:
            raise MalformedInputError(f"{place}: binary_data_size is not within the {len(binary)} bytes that follow")
        found[item["name"]] = _from_bytes(item, binary[start : start + size], place)
        start += size
    if start != len(binary):
        raise MalformedInputError(f"{len(binary)} bytes follow the JSON, but the inputs have {start} of them")
    return found


def _from_json(item: Mapping[str, Any], place: str) -> Tensor:
    datatype, shape = _type_of(item, place)
    if "data" not in item:
        raise MalformedInputError(f"{place} has neither data nor a binary_data_size")
    if datatype == "BYTES":
        return texts_of_json(item["data"], shape, place)
    return numbers_of_json(item["data"], shape, place)


def _from_bytes(item: Mapping[str, Any], raw: memoryview, place: str) -> Tensor:
    datatype, shape = _type_of(item, place)
    if "data" in item:
        raise MalformedInputError(f"{place} has data and a binary_data_size; give one of them")
    if datatype == "BYTES":
        return texts_of_bytes(raw, shape, place)
    return numbers_of_bytes(raw, shape, place)


def _type_of(item: Mapping[str, Any], place: str) -> tuple[str, tuple[int, ...]]:
    """Datatype and shape of an input."""
    datatype = item.get("datatype")
    if datatype not in ("BYTES", "INT64"):
        raise MalformedInputError(f"{place}: datatype must be BYTES or INT64, not {datatype!r:.40}")
    shape = check_shape(item.get("shape"), place)
    if datatype == "BYTES" and shape[1:] not in ((), (1,)):
        raise MalformedInputError(f"{place}: BYTES must have the shape [rows], not {list(shape)}")
    return str(datatype), shape


def write_answer(
    model: str, version: str, identity: str, values: Sequence[tuple[Wanted, np.ndarray]], parameters: Mapping[str, Any]
) -> InferAnswer:
    """The answer with its outputs.

    Raises:
        QrloraError: an output in JSON holds a number that is not finite.
    """
    outputs: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    for wanted, array in values:
        output = {"name": wanted.name, "datatype": wanted.datatype, "shape": list(array.shape)}
        if wanted.binary:
            pieces.append(to_bytes(array, wanted.datatype))
            outputs.append(output | {"parameters": {"binary_data_size": len(pieces[-1])}})
        else:
            outputs.append(output | {"data": to_json(array, wanted.name)})
    record: dict[str, Any] = {"model_name": model, "model_version": version} | ({"id": identity} if identity else {})
    record |= {"parameters": dict(parameters), "outputs": outputs}
    head = orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(wanted.binary for wanted, _ in values):
        return InferAnswer(head)
    return InferAnswer(b"".join([head, *pieces]), len(head))
