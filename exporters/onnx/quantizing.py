"""int8: the linear layers in the base's blocks compute in whole numbers, and so do the factors of customers' branches.

What is quantised is decided by the module that a product comes from, which the exporter notes on
every node it traces. Each output channel of a weight gets a scale of its own. Activations have one
for the whole tensor. It is found while the graph runs, so that an answer depends a little on its
batch; or, with texts to calibrate on, it is a constant of the graph, and a row has the same answer
in any batch, but values that no such text had are cut off.

The products with R and Q of a switchable graph have scales of their own, so that the small difference that a customer
is loses no more than its own last digits, where in merged weights it is rounded with the large numbers. What goes into
the product with Q is a customer's: each token is scaled to its own range before (`TableBranch.by_token`), or one
customer with large coefficients would take the digits of the others in his batch.

These stay in fp32:

- the coefficients;
- what lies outside of the numbered blocks, such as the pooler and the output layer: it sees one token
  of each text, so there is nothing to gain, and its error would reach the logits directly;
- attention, embeddings and LayerNorm. ONNX Runtime's quantiser makes an invalid operator of the
  `Attention` of opset 23, so it is shown nothing but the nodes it may touch.

In a merged graph the customer lies in the weights and is rounded with them.

x86 processors without VNNI lose large sums of 8-bit products. On such a machine weights get 7 bits, which is right
everywhere; a bundle from another machine may be wrong there, and `verify` tells.
"""

import ast
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from torch import nn

from exporters.onnx.switchable import TableBranch
from exporters.onnx.vnni_check import products_saturate
from qrlora_deploy.errors import CheckFailed, QrloraError, argument, first_line
from qrlora_deploy.models.targets import BLOCK, is_conv1d

INTEGER_PRODUCT = "MatMulInteger"
PRODUCTS = ("MatMul", "Gemm")
SCOPES = "pkg.torch.onnx.name_scopes"
"""The exporter's note: paths of the modules that a node comes from, outermost first, and last the
operation, as a list in Python's writing."""

PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Says that shapes are known. Without it the quantiser warns, and sets up the root logger for that."""

Inputs = dict[str, np.ndarray]


def block_products(nodes: Iterable[Any], wrapper: nn.Module) -> tuple[str, ...]:
    """Names of the products with constants in numbered blocks: of the base's own linear layers, and of branches.

    Args:
        nodes: as they were traced, with the exporter's notes.
        wrapper: what was traced; paths in the notes begin at it.
    """
    layers = {
        name
        for name, module in wrapper.named_modules()
        if (isinstance(module, nn.Linear | TableBranch) or is_conv1d(module)) and BLOCK.search(f".{name}.")
    }
    return tuple(
        node.name
        for node in nodes
        if node.op_type in PRODUCTS and _module_path(node) in layers and node.inputs[1].is_initializer()
    )


def _module_path(node: Any) -> str:
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def quantize_graph(
    path: Path, products: Sequence[str], external_from_bytes: int, calibration: Iterator[Inputs] | None = None
) -> None:
    """Replace the graph at `path`, and its weights in `{path.name}.data`, by one in int8.

    Args:
        path: of a graph in fp32, in a folder that is not yet in use.
        products: names of the nodes to quantise.
        external_from_bytes: tensors of this size and larger go to the weights' file.
        calibration: inputs of the graph to measure the ranges of activations on; None: they get
            their scales while the graph runs.

    Raises:
        QrloraError: there is nothing to quantise, or ONNX Runtime cannot.
        CheckFailed: products are not in whole numbers afterwards, or nothing became smaller.
    """
    if not products:
        raise QrloraError("no linear layer in a numbered block reached the graph, so int8 has nothing to quantise")
    data = path.with_name(f"{path.name}.data")
    before = path.stat().st_size + data.stat().st_size
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="int8-") as scratch:
        quantized = Path(scratch) / path.name
        _quantize(path, products, quantized, calibration)
        # Written anew: the quantiser puts tensors into the weights' file that ONNX Runtime reads too early.
        model = onnx_ir.load(quantized)
        model.metadata_props.clear()
        path.unlink()
        data.unlink()
        onnx_ir.save(model, path, external_data=data.name, size_threshold_bytes=external_from_bytes)
        found = sum(map(_is_whole, model.graph.all_nodes()))
    if found != len(products):
        raise CheckFailed(
            f"{found} of {len(products)} products are in whole numbers; choose another {argument('precision')}"
        )
    after = path.stat().st_size + data.stat().st_size
    if after >= before:
        raise CheckFailed(f"int8 is not smaller: {after} bytes, fp32 {before}; choose another {argument('precision')}")


def _is_whole(node: Any) -> bool:
    """Whether a product is in whole numbers.

    A calibrated one is written as a product of two dequantised tensors, which ONNX Runtime computes as one of integers.
    """
    if node.op_type == INTEGER_PRODUCT:
        return True
    makers = [value.producer() for value in node.inputs if value is not None] if node.op_type == "MatMul" else []
    return bool(makers) and all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


class _Reader:
    """What ONNX Runtime's calibration takes its inputs from."""

    def __init__(self, inputs: Iterator[Inputs]) -> None:
        self._inputs = inputs

    def get_next(self) -> Inputs | None:
        return next(self._inputs, None)


def _quantize(path: Path, products: Sequence[str], output: Path, calibration: Iterator[Inputs] | None) -> None:
    # Imported here: only this precision needs the quantiser.
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static

    model, nodes = _prepare(path, products)
    common = {
        "op_types_to_quantize": ["MatMul"],
        "nodes_to_quantize": nodes,
        "per_channel": True,
        "reduce_range": products_saturate(),
        "weight_type": QuantType.QInt8,
        "use_external_data_format": True,
    }
    try:
        if calibration is None:
            quantize_dynamic(model, output, **common)
        else:
            # What was found best of formats and methods, and what each loses: docs/precision.md.
            quantize_static(
                model,
                output,
                _Reader(calibration),
                quant_format=QuantFormat.QDQ,
                calibrate_method=CalibrationMethod.MinMax,
                activation_type=QuantType.QUInt8,
                # The sum of a product stays in fp32: rounded as well it loses more than all the rest.
                extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
                **common,
            )
    # It raises ValueError, RuntimeError, onnx's own and others, all about the graph.
    except Exception as error:
        reason = first_line(error)
        raise QrloraError(
            f"ONNX Runtime cannot quantise this model: {reason}; choose another {argument('precision')}"
        ) from error


def _prepare(path: Path, products: Sequence[str]) -> tuple[Any, list[str]]:
    """The graph as the quantiser wants it, and the names that `products` have in it."""
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = onnx.load(path)
    model.metadata_props.add(key=PREPARED[0], value=PREPARED[1])
    # A MatMul and an Add take the place of every Gemm, and are named so. This transposes the weight, but
    # not the shape that the graph notes for it.
    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    gemms = {node.name for node in model.graph.node if node.op_type == "Gemm"}
    ONNXModel(model).replace_gemm_with_matmul()
    return model, [f"{name}_MatMul" if name in gemms else name for name in products]
