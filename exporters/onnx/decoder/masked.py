"""The inputs that other clients know: an attention mask in the place of lengths.

A first prompt may be padded on either side: all rows are moved to the left edge, where the attention wants them, and
positions count the tokens of each row alone.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper

from exporters.onnx.decoder.layer import SEQLENS, TOTAL
from exporters.onnx.decoder.nodes import Nodes

MASK, TOKEN = "attention_mask", "token"

BATCH, TOKENS, PAST, ALL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
"""Names of axes; transformers.js makes its first cache from the first of them."""


def mask_inputs() -> list[onnx.ValueInfoProto]:
    """`input_ids [batch, tokens]` and `attention_mask [batch, tokens so far]`, both int64."""
    value = helper.make_tensor_value_info
    return [value("input_ids", TensorProto.INT64, [BATCH, TOKENS]), value(MASK, TensorProto.INT64, [BATCH, ALL])]


def read_mask(nodes: Nodes) -> str:
    """Nodes that make lengths of the mask, under the names that blocks read; returns the ids, at the left edge."""
    axis, one = nodes.constant("tokens_axis", [1], np.int64), nodes.constant("one", [1], np.int64)
    zero = nodes.constant("first", [0], np.int64)
    total = nodes.add("Shape", [MASK], start=1, end=2)
    nodes.add_many("Cast", [total], [TOTAL], to=TensorProto.INT32)
    # A row without a token would have the length -1.
    taken = nodes.add("Max", [nodes.add("Sub", [_count(nodes, MASK, axis), one]), zero])
    nodes.add_many("Cast", [taken], [SEQLENS], to=TensorProto.INT32)
    tokens = nodes.add("Shape", ["input_ids"], start=1, end=2)
    own = nodes.add("Slice", [MASK, nodes.add("Sub", [total, tokens]), total, axis])
    batch = nodes.add("Shape", ["input_ids"], start=0, end=1)
    row, step = nodes.constant("no_row", 0, np.int64), nodes.constant("a_row", 1, np.int64)
    rows = nodes.add("Range", [row, nodes.add("Squeeze", [batch]), step])
    last = nodes.add("Max", [nodes.add("Sub", [_count(nodes, own, axis), one]), zero])
    nodes.add_many("Add", [nodes.add("Mul", [rows, tokens]), last], [TOKEN])
    return nodes.add("GatherElements", ["input_ids", _order(nodes, own, tokens)], axis=1)


def _count(nodes: Nodes, mask: str, axis: str) -> str:
    return nodes.add("ReduceSum", [mask, axis], keepdims=0)


def _order(nodes: Nodes, mask: str, tokens: str) -> str:
    """Places of the tokens that take part, as they stand, then those of the padding."""
    row, step = nodes.constant("no_row", 0, np.int64), nodes.constant("a_row", 1, np.int64)
    places = nodes.add("Range", [row, nodes.add("Squeeze", [tokens]), step])
    keys = nodes.add("Sub", [nodes.add("Mul", [mask, tokens]), places])
    return nodes.add_many("TopK", [keys, tokens], 2, axis=-1, largest=1, sorted=1)[1]
