"""A second graph on the weights of the first."""

from pathlib import Path
from typing import Any

import onnx_ir

from qrlora_deploy.errors import QrloraError

LARGEST_OWN_BYTES = 2**26
"""Of the tensors that the second graph has for itself: they lie in its own file, which protobuf bounds."""


def write_beside(model: Any, first: Path, path: Path) -> None:
    """Write `model` to `path`; its weights are those of the graph `first`, which lies beside it.

    Args:
        model: an `onnx_ir.Model`, traced from the same module as `first`; a tensor of one name has one value.

    Raises:
        QrloraError: the graphs do not share their weights.
    """
    known = onnx_ir.load(first).graph.initializers
    own = 0
    for name, value in model.graph.initializers.items():
        other = known[name].const_value if name in known else None
        mine = value.const_value
        if isinstance(other, onnx_ir.ExternalTensor) and (other.shape, other.dtype) == (mine.shape, mine.dtype):
            value.const_value = other
        else:
            own += mine.nbytes
    if own > LARGEST_OWN_BYTES:
        raise QrloraError(f"{path.name} shares too few weights with {first.name}; please report this model")
    onnx_ir.save(model, path)
