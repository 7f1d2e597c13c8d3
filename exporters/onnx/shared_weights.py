"""A second graph on the weights of the first."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir

from qrlora_deploy.errors import QrloraError

SMALLEST_SHARED_BYTES = 2**12
"""Smaller tensors are not looked for in the other graph's file."""

LARGEST_OWN_BYTES = 2**26
"""Of the tensors that the second graph has for itself: they lie in its own file, which protobuf bounds."""


def write_beside(model: Any, first: Path, path: Path) -> None:
    """Write `model` to `path`; its weights are those of the graph `first`, which lies beside it.

    Args:
        model: an `onnx_ir.Model`, traced from the same module as `first`.

    Raises:
        QrloraError: the graphs do not share their weights.
    """
    known = {_content(tensor): tensor for tensor in _external(onnx_ir.load(first))}
    own = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        other = known.get(_content(tensor)) if tensor.nbytes >= SMALLEST_SHARED_BYTES else None
        if other is not None:
            value.const_value = onnx_ir.ExternalTensor(
                other.location,
                other.offset,
                other.length,
                other.dtype,
                shape=other.shape,
                name=value.name,
                base_dir=other.base_dir,
            )
        else:
            own += tensor.nbytes
    if own > LARGEST_OWN_BYTES:
        raise QrloraError(f"{path.name} shares too few weights with {first.name}; please report this model")
    onnx_ir.save(model, path)


def _external(model: Any) -> Iterator[Any]:
    values = (value.const_value for value in model.graph.initializers.values())
    return (tensor for tensor in values if isinstance(tensor, onnx_ir.ExternalTensor))


def _content(tensor: Any) -> tuple[str, tuple[int, ...], bytes]:
    """What two tensors have alike that are the same; names differ from trace to trace."""
    numbers = hashlib.sha256(tensor.tobytes()).digest()
    return str(tensor.dtype), tuple(tensor.shape), numbers
