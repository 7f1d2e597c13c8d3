"""Rotary positions as the operator wants them, with cosines and sines for every row of the batch.

From opset 23 on the exporter turns the arithmetic of rotary embeddings into one `RotaryEmbedding` operator for each
query and key. Models make one table for all rows, `[1, length, size / 2]`; multiplication does not mind, but the
operator wants `[batch, length, size / 2]`, and ONNX Runtime refuses every batch of more than one row. It is also
given a table of its own each time. Here all operators that turn by the same angles share one, expanded to the batch.
Graphs without the operator stay what they are.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

ROTARY = "RotaryEmbedding"
TABLES = (1, 2)
"""The inputs of the operator that are tables: of cosines and of sines."""


def expand_rotary_tables(model: ir.Model) -> int:
    """Give every rotary embedding of `model` tables for the whole batch, in place; returns how many there are.

    The batch is the first axis of the graph's first input.
    """
    found = [node for node in model.graph.all_nodes() if node.op_type == ROTARY]
    if not found:
        return 0
    size = _batch_size(model.graph)
    expanded: dict[Any, ir.Value] = {}
    for node in found:
        for index in TABLES:
            table = node.inputs[index]
            maker = table.producer() if table is not None else None
            if table is None or maker is None:
                continue
            key = (maker.op_type, tuple(maker.inputs))
            if key not in expanded:
                expand = ir.node("Expand", [table, size])
                maker.graph.insert_after(maker, [expand])
                expanded[key] = expand.outputs[0]
            node.replace_input_with(index, expanded[key])
    RemoveUnusedNodesPass()(model)
    return len(found)


def _batch_size(graph: ir.Graph) -> ir.Value:
    """`[batch, 1, 1]` int64, made at the beginning of the graph."""
    ones = ir.val("rotary_ones", const_value=ir.tensor(np.array([1, 1], dtype=np.int64), name="rotary_ones"))
    graph.register_initializer(ones)
    batch = ir.node("Shape", [graph.inputs[0]], {"start": 0, "end": 1})
    size = ir.node("Concat", [batch.outputs[0], ones], {"axis": 0})
    graph.insert_before(graph[0], [batch, size])
    return size.outputs[0]
