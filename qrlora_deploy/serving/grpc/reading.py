"""Requests of the protocol from its messages. Pure: a message in, dataclasses out.

Whatever is wrong with what a client sent is a `MalformedInputError` that names the tensor.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.serving.inference.requests import (
    MAX_TENSORS,
    InferRequest,
    Tensor,
    checked_parameters,
    chosen_outputs,
)
from qrlora_deploy.serving.inference.tensors import check_shape, numbers_of_bytes, text_of, texts_of_bytes

CONTENTS = {"BYTES": "bytes_contents", "INT64": "int64_contents"}
"""The field that holds elements of a datatype."""


def parse(message_class: Any, body: bytes) -> Any:
    """A message from its bytes.

    Raises:
        MalformedInputError: they are none of this class.
    """
    try:
        return message_class.FromString(body)
    except DecodeError as error:
        raise MalformedInputError(f"the body is no {message_class.DESCRIPTOR.full_name}") from error


def parameters_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as plain values; one without a value is left out."""
    chosen = ((name, value, value.WhichOneof("parameter_choice")) for name, value in found.items())
    return {name: getattr(value, choice) for name, value, choice in chosen if choice is not None}


def read_infer(message: Any, names: Sequence[str]) -> InferRequest:
    """The request of a `ModelInferRequest`.

    Its outputs are raw where its inputs are, or as the parameters `binary_data_output` and `binary_data` say.

    Args:
        message: the `ModelInferRequest`.
        names: of the outputs that the model has.

    Raises:
        MalformedInputError: it is none; the line says what is wrong.
    """
    for name in ("inputs", "outputs"):
        tensors = getattr(message, name)
        if len(tensors) > MAX_TENSORS or len({tensor.name for tensor in tensors}) < len(tensors):
            raise MalformedInputError(f"each of {name} must have a name of its own; {MAX_TENSORS} may be given")
    parameters = checked_parameters(parameters_of(message.parameters), "the request")
    raw_outputs = {"binary_data_output": bool(message.raw_input_contents)} | parameters
    outputs = [{"name": output.name, "parameters": parameters_of(output.parameters)} for output in message.outputs]
    return InferRequest(message.id, parameters, _inputs(message), chosen_outputs(outputs, raw_outputs, names))


def _inputs(message: Any) -> dict[str, Tensor]:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise MalformedInputError(f"raw_input_contents has {len(raw)} elements for {len(message.inputs)} inputs")
    found: dict[str, Tensor] = {}
    for number, tensor in enumerate(message.inputs):
        place = f"input {tensor.name!r:.60}"
        checked_parameters(parameters_of(tensor.parameters), place)
        shape = check_shape(list(tensor.shape), place)
        if tensor.datatype not in CONTENTS:
            raise MalformedInputError(f"{place}: datatype must be BYTES or INT64, not {tensor.datatype!r:.40}")
        if not raw:
            found[tensor.name] = _typed(tensor, shape, place)
        elif tensor.HasField("contents"):
            raise MalformedInputError(f"{place} has contents beside raw_input_contents; give one of them")
        else:
            found[tensor.name] = _raw(tensor.datatype, memoryview(raw[number]), shape, place)
    return found


def _raw(datatype: str, raw: memoryview, shape: tuple[int, ...], place: str) -> Tensor:
    return texts_of_bytes(raw, shape, place) if datatype == "BYTES" else numbers_of_bytes(raw, shape, place)


def _typed(tensor: Any, shape: tuple[int, ...], place: str) -> Tensor:
    wanted = CONTENTS[tensor.datatype]
    others = [field.name for field, _ in tensor.contents.ListFields() if field.name != wanted]
    if others:
        raise MalformedInputError(f"{place}: {tensor.datatype} belongs into {wanted}, not into {others[0]}")
    values: Sequence[Any] = getattr(tensor.contents, wanted)
    if len(values) != math.prod(shape):
        raise MalformedInputError(f"{place}: the shape {list(shape)} is not that of {len(values)} elements")
    if tensor.datatype == "BYTES":
        return [text_of(value, number, place) for number, value in enumerate(values)]
    return np.array(values, dtype=np.int64).reshape(shape)
