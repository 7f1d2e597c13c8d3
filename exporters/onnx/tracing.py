"""A PyTorch module as a program of `torch.onnx`, without what the exporter says and notes beside it."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript.optimizer import optimize_ir

from exporters.onnx.rewriting import rewritten_programs
from qrlora_deploy.errors import QrloraError, first_line
from qrlora_deploy.runtime.host.collection import no_collection

Example = tuple[torch.Tensor, tuple[str | int, ...]]
"""A tensor to trace with, and its axes: a dynamic one has a name instead of a size."""


def export_program(
    module: torch.nn.Module,
    examples: Mapping[str, Example],
    dynamic_shapes: tuple[dict[int, Any], ...],
    opset: int,
    output_names: list[str],
    what: str,
) -> Any:
    """Trace a module that takes its inputs by position, as a program of `torch.onnx`, optimised.

    Args:
        module: in evaluation mode.
        examples: of its inputs, by name.
        dynamic_shapes: of each input, the axes that are dynamic.
        opset: of the operators.
        output_names: in order.
        what: names the model in an error.

    Raises:
        QrloraError: it cannot be traced.
    """
    export = partial(
        torch.onnx.export,
        module,
        tuple(tensor for tensor, _axes in examples.values()),
        dynamo=True,
        opset_version=opset,
        input_names=list(examples),
        output_names=output_names,
        dynamic_shapes=(dynamic_shapes,),
        verbose=False,
        # This would also fuse operators of opset 23 in ways that are wrong: it gives a rotary embedding
        # tables of one row, whatever the batch, and mixes the dtypes of a norm that computes in fp32.
        optimize=False,
    )
    try:
        with warnings.catch_warnings(), _quiet_exporter(), no_collection(), torch.no_grad():
            # Deprecations inside torch and transformers, nothing a user can act on.
            warnings.simplefilter("ignore")
            program: Any = _export_rewritten(export)
            optimize_ir(program.model)
            _straighten(program.model)
            return program
    except torch.onnx.errors.OnnxExporterError as error:
        reason = first_line(error.__cause__ or error)
        raise QrloraError(f"{what} cannot be exported to ONNX: {reason}") from error


def _straighten(model: Any) -> None:
    """Have transposed weights laid out when they are written, one after the other.

    They are views of the model's own, which numpy would write number by number.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor.raw, np.ndarray) and not tensor.raw.flags.c_contiguous:
            laid_out = partial(_laid_out, tensor)
            value.const_value = onnx_ir.LazyTensor(laid_out, tensor.dtype, tensor.shape, name=tensor.name)


def _laid_out(tensor: Any) -> Any:
    # By PyTorch, which does it faster; as integers, since it knows fewer dtypes.
    bits = torch.from_numpy(tensor.raw.view(f"i{tensor.raw.itemsize}")).contiguous()
    return onnx_ir.Tensor(bits.numpy().view(tensor.raw.dtype), dtype=tensor.dtype)


def _export_rewritten(export: Callable[[], Any]) -> Any:
    """By the short way, and where that ends at an operator without an ONNX function, by torch's own."""
    try:
        with rewritten_programs():
            return export()
    except torch.onnx.errors.OnnxExporterError:
        return export()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks that torchvision, which nothing here needs, is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def strip_traces(model: Any) -> None:
    """Remove the source lines and stack traces that the exporter notes on every node: they name
    folders of the machine that exported and are most of the file."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for holder in (model, model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        holder.metadata_props.clear()
