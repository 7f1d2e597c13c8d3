"""A request of the protocol, read: tensors by name, and the outputs that it asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.serving.outputs import DATATYPES

MAX_TENSORS = 64

UNSUPPORTED = ("classification", "shared_memory_region")
"""Parameters of Triton's that would change an answer, and are not offered."""

Tensor = np.ndarray | list[str]


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for.

    Attributes:
        name: of `OUTPUTS`.
        binary: as binary data; else in JSON.
        datatype: "FP32", "FP16" (binary alone) or "BYTES".
    """

    name: str
    binary: bool = False
    datatype: str = "FP32"


@dataclass(frozen=True)
class InferRequest:
    """A request, parsed.

    Attributes:
        id: to be echoed; empty: there was none.
        parameters: of the request.
        inputs: INT64 as arrays of their shape, BYTES as flat lists of texts.
        wanted: outputs, in the order asked for.
    """

    id: str
    parameters: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    wanted: tuple[Wanted, ...]


def checked_parameters(parameters: Any, place: str) -> dict[str, Any]:
    """Parameters of a request or a tensor, none of which asks for what is not offered.

    Raises:
        MalformedInputError: one does, or they are no object.
    """
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise MalformedInputError(f"parameters of {place} must be an object")
    for name in UNSUPPORTED:
        if parameters.get(name):
            raise MalformedInputError(f"{place} asks for {name}, which this server does not offer")
    return parameters


def chosen_outputs(
    outputs: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any], names: Sequence[str]
) -> tuple[Wanted, ...]:
    """The outputs that a request asks for; all of them where it names none.

    Args:
        outputs: `name`, and `parameters` where it has some, of each.
        parameters: of the request.
        names: of the outputs that the model has.

    Raises:
        MalformedInputError: there is no such output, or not in that form.
    """
    if not names:
        raise MalformedInputError("this model tags words, which are no tensors; ask POST /v1/classify for its spans")
    asked = outputs or [{"name": name} for name in names]
    return tuple(_one_wanted(item, parameters, names) for item in asked)


def _one_wanted(item: Mapping[str, Any], of_request: Mapping[str, Any], names: Sequence[str]) -> Wanted:
    name = item["name"]
    place = f"output {name!r:.60}"
    if name not in names:
        raise MalformedInputError(f"there is no {place}; choose from {', '.join(names)}")
    own = checked_parameters(item.get("parameters"), place)
    binary = own.get("binary_data", of_request.get("binary_data_output", False))
    if not isinstance(binary, bool):
        raise MalformedInputError(f"{place}: binary_data must be true or false")
    datatype = DATATYPES[name]
    if datatype == "FP32":
        datatype = own.get("datatype", of_request.get("datatype", datatype))
    if datatype == "FP16" and not binary:
        raise MalformedInputError(f"{place}: FP16 goes as binary data alone; set binary_data, or take FP32")
    if datatype not in ("FP32", "FP16", "BYTES"):
        raise MalformedInputError(f"{place}: datatype must be FP32 or FP16, not {datatype!r:.40}")
    return Wanted(name, binary, datatype)
