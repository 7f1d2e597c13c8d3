"""Answers of the protocol as its messages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qrlora_deploy.serving.grpc.schema import ModelInferResponse
from qrlora_deploy.serving.inference.requests import Wanted
from qrlora_deploy.serving.inference.tensors import to_bytes


def write_infer(
    model: str, version: str, identity: str, values: Sequence[tuple[Wanted, np.ndarray]], parameters: Mapping[str, str]
) -> Any:
    """A `ModelInferResponse`. All outputs are raw as soon as one is to be: the protocol has no mixture."""
    message = ModelInferResponse(model_name=model, model_version=version, id=identity)
    for name, value in parameters.items():
        message.parameters[name].string_param = value
    is_raw = any(wanted.binary for wanted, _ in values)
    for wanted, array in values:
        output = message.outputs.add(name=wanted.name, datatype=wanted.datatype, shape=array.shape)
        if is_raw:
            message.raw_output_contents.append(to_bytes(array, wanted.datatype))
        elif wanted.datatype == "BYTES":
            output.contents.bytes_contents.extend(text.encode() for text in array.ravel())
        else:
            output.contents.fp32_contents.extend(array.ravel().tolist())
    return message
