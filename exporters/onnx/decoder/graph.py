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
from exporters.onnx.decoder.external_data import ExternalData
from exporters.onnx.decoder.layer import SEQLENS, TOTAL, Blocks
from exporters.onnx.decoder.nodes import MICROSOFT, Nodes
from exporters.onnx.decoder.products import Products, folds_of
from exporters.onnx.decoder.shape import Shape
from exporters.onnx.decoder.tensors import Tensors
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE, TABLE_DTYPES, TableLayout

OPSET, IR_VERSION = 21, 10

NO_SLOT = 2**31 - 1
"""What a negative slot becomes: a row that no table has. Gather takes -1 for the last row, which is a customer's."""

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
    """

    shape: Shape
    tensors: Tensors
    basis: Basis
    values: np.ndarray | None = None
    dtype: Any = np.float32
    table_dtype: str = "fp32"
    bits: int = 0


def write_decoder(plan: Plan, folder: Path, file: str) -> onnx.ModelProto:
    """Write the graph to `file` in `folder`, and its weights beside it; returns the graph without them.

    Raises:
        InputError: the checkpoint has other tensors than its family, or the basis adapts what no product has.
    """
    with ExternalData(folder) as data:
        nodes = Nodes(data, plan.dtype)
        model = _build(plan, nodes)
    onnx.save(model, str(folder / file))
    return model


def _build(plan: Plan, nodes: Nodes) -> onnx.ModelProto:
    merged = plan.values is not None
    branches = Branches(None if merged else plan.basis)
    folds = folds_of(plan.basis, plan.values) if plan.values is not None else {}
    products = Products(nodes, plan.tensors, branches, folds, plan.bits)
    _answer(plan, nodes, Blocks(nodes, plan.tensors, products, plan.shape).add_all(_embed(plan, nodes)))
    branches.check_all_taken()
    products.check_all_folded()
    plan.tensors.check_all_used()
    if not merged:
        _add_coefficients(plan, nodes, branches, products)
    graph = helper.make_graph(
        nodes.nodes, "decoder", _inputs(plan, nodes), _outputs(plan, nodes), list(nodes.initializers.values())
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qrlora-deploy")


def _embed(plan: Plan, nodes: Nodes) -> str:
    weight = nodes.weight(EMBEDDING, lambda: plan.tensors.read(EMBEDDING))
    embedded = nodes.add("Gather", [weight, "input_ids"])
    if not plan.shape.family.scaled_embedding:
        return embedded
    return nodes.add("Mul", [embedded, nodes.constant("embedding_scale", plan.shape.hidden**0.5, nodes.dtype)])


def _answer(plan: Plan, nodes: Nodes, hidden: str) -> None:
    """Logits of the last token of each row alone, and the likeliest next token."""
    flat = nodes.add("Reshape", [hidden, nodes.constant("flat", [-1, plan.shape.hidden], np.int64)])
    last = nodes.add("Gather", [flat, "token"])
    logits = _head(plan, nodes, last)
    if nodes.dtype != np.float32:
        logits = nodes.add("Cast", [logits], to=TensorProto.FLOAT)
    if plan.shape.logits_softcap:
        cap = nodes.constant("logits_softcap", plan.shape.logits_softcap, np.float32)
        logits = nodes.add("Mul", [nodes.add("Tanh", [nodes.add("Div", [logits, cap])]), cap])
    nodes.nodes[-1].output[0] = LOGITS
    # In the graph, as all logits of a batch are megabytes that a greedy row does not need on the host.
    nodes.add_many("ArgMax", [LOGITS], [GREEDY], axis=-1, keepdims=0)


def _head(plan: Plan, nodes: Nodes, last: str) -> str:
    """`[batch, hidden]` to `[batch, vocabulary]`; a tied head is the embedding itself, unless it is quantised."""
    name = EMBEDDING if plan.shape.tied else "lm_head.weight"
    if plan.bits:
        shape = plan.shape.vocabulary, plan.shape.hidden
        return blockwise(nodes, last, "lm_head", shape, lambda: plan.tensors.read(name).astype(np.float32), HEAD_BITS)
    return nodes.add("Gemm", [last, nodes.weight(name, lambda: plan.tensors.read(name))], transB=1)


def _add_coefficients(plan: Plan, nodes: Nodes, branches: Branches, products: Products) -> None:
    """One gather of the rows' coefficients and one split for all branches, before everything else."""
    inner, nodes.nodes = nodes.nodes, []
    nodes.start_at = len(inner)
    negative = nodes.add("Less", [SLOT, nodes.constant("zero", 0, np.int64)])
    slot = nodes.add("Where", [negative, nodes.constant("no_slot", NO_SLOT, np.int64), SLOT])
    rows = nodes.add("Gather", [TABLE, slot])
    order = branches.order()
    if not np.array_equal(order, np.arange(len(order))):
        rows = nodes.add("Gather", [rows, nodes.constant("order", order, np.int64)], axis=1)
    if np_dtype_to_tensor_dtype(TABLE_DTYPES[plan.table_dtype]) != nodes.kind:
        rows = nodes.add("Cast", [rows], to=nodes.kind)
    rows = nodes.add("Unsqueeze", [rows, nodes.constant("tokens_axis", [1], np.int64)])
    sizes = nodes.constant("branch_sizes", [branch.rank for branch in branches.asked], np.int64)
    nodes.add_many("Split", [rows, sizes], products.parts, axis=2)
    nodes.nodes += inner


def _inputs(plan: Plan, nodes: Nodes) -> list[onnx.ValueInfoProto]:
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        value(SEQLENS, TensorProto.INT32, ["batch"]),
        value(TOTAL, TensorProto.INT32, [1]),
        value("token", TensorProto.INT64, ["batch"]),
    ]
    if plan.values is None:
        layout = TableLayout(list(plan.basis.ranks.values()), plan.table_dtype)
        kind = np_dtype_to_tensor_dtype(layout.dtype)
        inputs += [value(TABLE, kind, ["slots", layout.width]), value(SLOT, TensorProto.INT64, ["batch"])]
    return inputs + _cache(plan, nodes, "past_key_values")


def _outputs(plan: Plan, nodes: Nodes) -> list[onnx.ValueInfoProto]:
    logits = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", plan.shape.vocabulary])
    greedy = helper.make_tensor_value_info(GREEDY, TensorProto.INT64, ["batch"])
    return [logits, *_cache(plan, nodes, "present"), greedy]


def _cache(plan: Plan, nodes: Nodes, prefix: str) -> list[onnx.ValueInfoProto]:
    axes: list[str | int | None] = ["batch", plan.shape.kv_heads, "buffer", plan.shape.head_size]
    names = [f"{prefix}.{layer}.{part}" for layer in range(plan.shape.layers) for part in ("key", "value")]
    return [helper.make_tensor_value_info(name, nodes.kind, axes) for name in names]
