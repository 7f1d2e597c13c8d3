"""A decoder as an ONNX graph: `docs/decoders.md` has its inputs and outputs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.helper import np_dtype_to_tensor_dtype

from exporters.onnx.decoder.blockwise import blockwise
from exporters.onnx.decoder.branches import Branches
from exporters.onnx.decoder.coefficients import add_coefficients
from exporters.onnx.decoder.external_data import FILE, ExternalData
from exporters.onnx.decoder.layer import SEQLENS, TOTAL, Blocks
from exporters.onnx.decoder.masked import ALL, BATCH, PAST, TOKEN, mask_inputs, read_mask
from exporters.onnx.decoder.nodes import MICROSOFT, Nodes
from exporters.onnx.decoder.products import Products, folds_of
from exporters.onnx.decoder.shape import Shape
from exporters.onnx.decoder.tensors import Tensors
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE, TableLayout

OPSET, IR_VERSION = 21, 10

HEAD_BITS = 8
"""Of a head, where weights are quantised: it is read whole for every token, and its errors are those of logits."""

LOGITS, GREEDY = "logits", "greedy"

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Plan:
    """What a graph is made from.

    Attributes:
        shape: of the decoder.
        tensors: its weights.
        basis: whose targets have branches, or are merged.
        values: `[total_rank]` fp32 of the customer that is folded in; None: any customer in any row.
        dtype: of weights and activations.
        table_dtype: of the coefficient table, "fp32" or "fp16".
        bits: of the base's weights, 4 or 8; 0: they are not quantised.
        masked: the graph has the inputs that other clients know (`masked`), and the logits a tokens' axis of one.
        one_customer: all rows have one customer: the table has one row, and is zero where it is not given.
    """

    shape: Shape
    tensors: Tensors
    basis: Basis
    values: np.ndarray | None = None
    dtype: Any = np.float32
    table_dtype: str = "fp32"
    bits: int = 0
    masked: bool = False
    one_customer: bool = False

    @property
    def table(self) -> TableLayout:
        """Of a switchable graph."""
        return TableLayout(list(self.basis.ranks.values()), self.table_dtype)


def write_decoder(plan: Plan, folder: Path, file: str, data_file: str = FILE) -> onnx.ModelProto:
    """Write the graph to `file` in `folder`, and its weights beside it; returns the graph without them.

    Raises:
        InputError: the checkpoint has other tensors than its family, or the basis adapts what no product has.
    """
    with ExternalData(folder, data_file) as data:
        nodes = Nodes(data, plan.dtype)
        model = _build(plan, nodes)
    onnx.save(model, str(folder / file))
    return model


def _build(plan: Plan, nodes: Nodes) -> onnx.ModelProto:
    merged = plan.values is not None
    branches = Branches(None if merged else plan.basis, level=nodes.dtype != np.float32)
    folds = folds_of(plan.basis, plan.values) if plan.values is not None else {}
    products = Products(nodes, plan.tensors, branches, folds, plan.bits)
    _answer(plan, nodes, Blocks(nodes, plan.tensors, products, plan.shape).add_all(_embed(plan, nodes)))
    branches.check_all_taken()
    products.check_all_folded()
    plan.tensors.check_all_used()
    if not merged:
        add_coefficients(nodes, branches, products.parts, plan.table_dtype, plan.one_customer)
    graph = helper.make_graph(
        nodes.nodes, "decoder", _inputs(plan, nodes), _outputs(plan, nodes), list(nodes.initializers.values())
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qrlora-deploy")


def _embed(plan: Plan, nodes: Nodes) -> str:
    weight = nodes.weight(EMBEDDING, lambda: plan.tensors.read(EMBEDDING))
    embedded = nodes.add("Gather", [weight, read_mask(nodes) if plan.masked else "input_ids"])
    if not plan.shape.family.scaled_embedding:
        return embedded
    return nodes.add("Mul", [embedded, nodes.constant("embedding_scale", plan.shape.hidden**0.5, nodes.dtype)])


def _answer(plan: Plan, nodes: Nodes, hidden: str) -> None:
    """Logits of the last token of each row alone, and the likeliest next token."""
    flat = nodes.add("Reshape", [hidden, nodes.constant("flat", [-1, plan.shape.hidden], np.int64)])
    last = nodes.add("Gather", [flat, TOKEN])
    logits = _head(plan, nodes, last)
    if nodes.dtype != np.float32:
        logits = nodes.add("Cast", [logits], to=TensorProto.FLOAT)
    if plan.shape.logits_softcap:
        cap = nodes.constant("logits_softcap", plan.shape.logits_softcap, np.float32)
        logits = nodes.add("Mul", [nodes.add("Tanh", [nodes.add("Div", [logits, cap])]), cap])
    if plan.masked:
        nodes.add("Unsqueeze", [logits, nodes.constant("tokens_axis", [1], np.int64)])
    nodes.nodes[-1].output[0] = LOGITS
    if not plan.masked:
        # In the graph, as all logits of a batch are megabytes that a greedy row does not need on the host.
        nodes.add_many("ArgMax", [LOGITS], [GREEDY], axis=-1, keepdims=0)


def _head(plan: Plan, nodes: Nodes, last: str) -> str:
    """`[batch, hidden]` to `[batch, vocabulary]`; a tied head is the embedding itself, unless it is quantised."""
    name = EMBEDDING if plan.shape.tied else "lm_head.weight"
    if plan.bits:
        shape = plan.shape.vocabulary, plan.shape.hidden
        return blockwise(nodes, last, "lm_head", shape, lambda: plan.tensors.read(name).astype(np.float32), HEAD_BITS)
    return nodes.add("Gemm", [last, nodes.weight(name, lambda: plan.tensors.read(name))], transB=1)


def _inputs(plan: Plan, nodes: Nodes) -> list[onnx.ValueInfoProto]:
    inputs = mask_inputs() if plan.masked else _length_inputs()
    if plan.values is None:
        inputs += _customer_inputs(plan)
    return inputs + _cache(plan, nodes, "past_key_values", PAST)


def _length_inputs() -> list[onnx.ValueInfoProto]:
    value = helper.make_tensor_value_info
    return [
        value("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        value(SEQLENS, TensorProto.INT32, ["batch"]),
        value(TOTAL, TensorProto.INT32, [1]),
        value("token", TensorProto.INT64, ["batch"]),
    ]


def _customer_inputs(plan: Plan) -> list[onnx.ValueInfoProto]:
    value, kind = helper.make_tensor_value_info, np_dtype_to_tensor_dtype(plan.table.dtype)
    if plan.one_customer:
        return [value(TABLE, kind, [1, plan.table.width])]
    batch = BATCH if plan.masked else "batch"
    return [value(TABLE, kind, ["slots", plan.table.width]), value(SLOT, TensorProto.INT64, [batch])]


def _outputs(plan: Plan, nodes: Nodes) -> list[onnx.ValueInfoProto]:
    axes: list[str | int] = [BATCH, 1] if plan.masked else ["batch"]
    logits = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [*axes, plan.shape.vocabulary])
    if plan.masked:
        return [logits, *_cache(plan, nodes, "present", ALL)]
    greedy = helper.make_tensor_value_info(GREEDY, TensorProto.INT64, ["batch"])
    return [logits, *_cache(plan, nodes, "present", "buffer"), greedy]


def _cache(plan: Plan, nodes: Nodes, prefix: str, tokens: str) -> list[onnx.ValueInfoProto]:
    names = (BATCH, tokens) if plan.masked else ("batch", "buffer")
    axes: list[str | int | None] = [names[0], plan.shape.kv_heads, names[1], plan.shape.head_size]
    parts = [f"{prefix}.{layer}.{part}" for layer in range(plan.shape.layers) for part in ("key", "value")]
    return [helper.make_tensor_value_info(part, nodes.kind, axes) for part in parts]
