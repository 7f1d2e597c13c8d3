"""The graph that draws of all tokens where the best ones do not hold what top-p and min-p keep.

Nothing is sorted: the least likely token that is kept is found by halving the interval in which its logit lies.
"""

import numpy as np
import onnx
from onnx import TensorProto

from exporters.onnx.decoder.drawing_nodes import BLOCK, DrawingNodes
from qrlora_deploy.runtime.generation.wishes import DRAWN, LOGITS, LOGPROB

HALVINGS = 25
"""Tokens count as equally likely whose logits, over the temperature, are about 1e-6 apart; of those the first ids are
better."""

SLIGHTLY = 1e-3
"""More than what rounding takes from a sum of weights."""


def drawing_of_all() -> onnx.ModelProto:
    """The graph, with the inputs of `drawing_graph`, but for `top_k`; it answers `DRAWN` and `LOGPROB`."""
    nodes = DrawingNodes()
    blocks = nodes.blocks(BLOCK)
    largest = nodes.largest(nodes.largest(blocks, 2), 1)
    below = nodes.add("Sub", [blocks, largest])
    scaled = nodes.scaled(below)
    weights = nodes.add("Exp", [scaled])
    total = nodes.sum(nodes.block_sums(weights))
    kept = _likely(nodes, scaled, weights, total)
    heavy = nodes.add("Not", [nodes.add("Less", [weights, _deep(nodes, "min_p")])])
    kept = nodes.where(nodes.add("And", [kept, heavy]), weights, _small(nodes, 0.0))
    drawn, mass = nodes.place(kept, "share")
    nodes.named(nodes.known(drawn, nodes.add("Less", [nodes.real(0.0), mass]), total), DRAWN)
    top = nodes.cast(nodes.add("Reshape", [largest, nodes.whole([0, -1])]))
    nodes.named(nodes.logprob(DRAWN, nodes.add("Add", [top, nodes.log_sum(below)])), LOGPROB)
    return nodes.model("drawing_of_all", (DRAWN, LOGPROB))


def _likely(nodes: DrawingNodes, scaled: str, weights: str, total: str) -> str:
    """Which tokens top-p keeps."""
    wanted = nodes.add("Mul", ["top_p", total])
    low, high = _halved(nodes, scaled, weights, wanted, total)
    sure = nodes.add("Not", [nodes.add("Less", [scaled, high])])
    equal = nodes.add("And", [nodes.add("Not", [nodes.add("Less", [scaled, low])]), nodes.add("Less", [scaled, high])])
    lacking = nodes.add("Sub", [wanted, _mass(nodes, sure, weights)])
    first = nodes.add("And", [equal, nodes.add("LessOrEqual", [_ids(nodes), _last(nodes, equal, weights, lacking)])])
    whole = nodes.add("Unsqueeze", [nodes.add("Less", [nodes.real(1.0), "top_p"]), nodes.whole([2])])
    return nodes.add("Or", [nodes.add("Or", [sure, first]), whole])


def _halved(nodes: DrawingNodes, scaled: str, weights: str, wanted: str, total: str) -> tuple[str, str]:
    """Logs of weights `[rows, 1, 1]` fp32: tokens from the first one on hold what is wanted, from the second on not."""
    rest = nodes.add("Max", [nodes.add("Sub", [nodes.real(1.0), "top_p"]), nodes.real(1e-30)])
    # Tokens below share out less than the rest even if they are all.
    least = nodes.add("Div", [nodes.add("Mul", [rest, total]), nodes.cast(nodes.size(LOGITS))])
    low = _deep(nodes, nodes.add("Sub", [nodes.add("Log", [least]), nodes.real(SLIGHTLY)]))
    high = nodes.add("Add", [nodes.add("Mul", [low, _small(nodes, 0.0)]), _small(nodes, SLIGHTLY)])
    mass = _deep(nodes, wanted)
    for _ in range(HALVINGS):
        middle = nodes.add("Mul", [nodes.add("Add", [low, high]), _small(nodes, 0.5)])
        held = nodes.where(nodes.add("Less", [scaled, middle]), _small(nodes, 0.0), weights)
        enough = nodes.add("LessOrEqual", [mass, nodes.add("ReduceSum", [held, nodes.whole([1, 2])], keepdims=1)])
        low, high = nodes.where(enough, middle, low), nodes.where(enough, high, middle)
    return low, high


def _last(nodes: DrawingNodes, equal: str, weights: str, lacking: str) -> str:
    """The last id `[rows, 1, 1]` of those equally likely tokens that are needed for what is lacking."""
    counts = nodes.block_sums(nodes.cast(equal, TensorProto.FLOAT))
    reached = nodes.up_to(counts)
    each = nodes.add("Div", [_mass(nodes, equal, weights), nodes.last(reached)])
    wanted = nodes.add("Max", [nodes.add("Ceil", [nodes.add("Div", [lacking, each])]), nodes.real(1.0)])
    # The place of the first that passes half a token less.
    wanted = nodes.add("Sub", [wanted, nodes.real(0.5)])
    block = nodes.block_of(reached, wanted)
    before = nodes.add("Sub", [nodes.taken(reached, block), nodes.taken(counts, block)])
    inside = nodes.taken_blocks(nodes.cast(equal, TensorProto.FLOAT), block, BLOCK)
    place = nodes.count(nodes.add("LessOrEqual", [nodes.up_to(nodes.cast(inside)), nodes.add("Sub", [wanted, before])]))
    first = nodes.add("Mul", [nodes.cast(block), nodes.real(float(BLOCK))])
    return nodes.add("Unsqueeze", [nodes.add("Add", [first, place]), nodes.whole([2])])


def _ids(nodes: DrawingNodes) -> str:
    """`[blocks, BLOCK]` fp64."""
    blocks = nodes.add("Div", [nodes.add("Add", [nodes.size(LOGITS), nodes.whole(BLOCK - 1)]), nodes.whole(BLOCK)])
    ids = nodes.counted(nodes.add("Mul", [blocks, nodes.whole(BLOCK)]))
    return nodes.add("Reshape", [ids, nodes.whole([-1, BLOCK])])


def _mass(nodes: DrawingNodes, mask: str, weights: str) -> str:
    """The sum of some weights, `[rows, 1]` fp64."""
    return nodes.sum(nodes.block_sums(nodes.where(mask, weights, _small(nodes, 0.0))))


def _deep(nodes: DrawingNodes, values: str) -> str:
    """`[rows, 1]` fp64 as `[rows, 1, 1]` fp32."""
    return nodes.add("Unsqueeze", [nodes.cast(values, TensorProto.FLOAT), nodes.whole([2])])


def _small(nodes: DrawingNodes, value: float) -> str:
    """A constant fp32."""
    return nodes.constant(f"small_{value}", value, np.float32)
