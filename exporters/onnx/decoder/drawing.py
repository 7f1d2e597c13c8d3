"""The graph that draws tokens where the logits lie: `python -m exporters.onnx.decoder.drawing` writes it.

It says what `qrlora_deploy.runtime.generation.drawing` says in numpy: the same tokens for the same share, to rounding.
It is written so that runs can be captured on a GPU, and no result is left to the order in which a GPU finds equal ones.
"""

from dataclasses import dataclass

import onnx
from onnx import TensorProto

from exporters.onnx.decoder.drawing_nodes import BLOCK, NOBODY, DrawingNodes
from exporters.onnx.decoder.drawing_of_all import drawing_of_all
from qrlora_deploy.runtime.generation.wishes import (
    ANSWERS,
    CANDIDATES,
    DRAWN,
    FILE,
    FILE_OF_ALL,
    IDS,
    LOGITS,
    LOGPROB,
    LOGPROBS,
    TOLD,
)

PIECE = 32
"""Logits of which one, the largest, stands for all where the best ones are looked for."""


@dataclass(frozen=True)
class _Best:
    """The best logits of each row, the best one first, of equal ones the lowest id.

    Attributes:
        values: `[rows, count]` fp32.
        ids: `[rows, count]` int64.
        count: how many, int64 `[1]`.
        largest: `[rows, 1]` fp32.
    """

    values: str
    ids: str
    count: str
    largest: str


def drawing_graph(candidates: int = CANDIDATES, piece: int = PIECE) -> onnx.ModelProto:
    """The graph: inputs are `LOGITS [rows, vocabulary]` fp32 and `SETTINGS [rows, 1]` fp64, outputs `ANSWERS`.

    Args:
        candidates: best logits of each row that are looked at.
        piece: as `PIECE`.
    """
    nodes = DrawingNodes()
    best = _best(nodes, candidates, piece)
    below = nodes.add("Sub", [nodes.blocks(BLOCK), nodes.add("Unsqueeze", [best.largest, nodes.whole([2])])])
    free, total = nodes.place(nodes.add("Exp", [nodes.scaled(below)]), "share")
    kept, enough, weights = _kept(nodes, best, total)
    unfiltered = nodes.add("Less", ["top_k", nodes.real(0.5)])
    drawn = nodes.where(unfiltered, free, _among(nodes, best, kept, weights))
    nodes.named(nodes.known(drawn, nodes.add("Or", [unfiltered, enough]), total), DRAWN)
    lost = nodes.add("Add", [nodes.cast(best.largest), nodes.log_sum(below)])
    nodes.named(nodes.logprob(DRAWN, lost), LOGPROB)
    nodes.named(nodes.part(best.ids, 0, TOLD), IDS)
    nodes.named(nodes.add("Sub", [nodes.cast(nodes.part(best.values, 0, TOLD)), lost]), LOGPROBS)
    return nodes.model("drawing", ANSWERS)


def _best(nodes: DrawingNodes, candidates: int, piece: int) -> _Best:
    """They stand in the pieces whose largest are the best."""
    pieces = nodes.blocks(piece)
    tops = nodes.largest(pieces, 2, keep=0)
    count = nodes.add("Min", [nodes.size(LOGITS), nodes.whole([candidates])])
    wanted = nodes.add("Min", [nodes.size(tops), count])
    # In the order of ids, by which equal ones are told apart.
    chosen, _ = nodes.rising(nodes.ranked(tops, wanted), wanted)
    found = nodes.taken_blocks(pieces, chosen, piece)
    places = nodes.ranked(found, count)
    size = nodes.whole(piece)
    first = nodes.add("Mul", [nodes.taken(chosen, nodes.add("Div", [places, size])), size])
    ids = nodes.add("Add", [first, nodes.add("Mod", [places, size])])
    return _Best(nodes.taken(found, places), ids, count, nodes.largest(tops, 1))


def _kept(nodes: DrawingNodes, best: _Best, total: str) -> tuple[str, str, str]:
    """Which candidates may be drawn, whether there are no others, and the weights of all candidates fp64."""
    below = nodes.add("Sub", [nodes.cast(best.values), nodes.cast(best.largest)])
    weights = nodes.add("Exp", [nodes.add("Div", [below, "temperature"])])
    first = nodes.add("Less", [nodes.counted(best.count), "top_k"])
    heavy = nodes.where(first, weights, nodes.real(0.0))
    reached = nodes.up_to(heavy)
    held = nodes.add("LessOrEqual", ["top_k", nodes.cast(best.count)])
    wanted = nodes.add("Mul", ["top_p", nodes.where(held, nodes.last(reached), total)])
    likely = nodes.add("Less", [nodes.add("Sub", [reached, heavy]), wanted])
    light = nodes.add("Less", [weights, "min_p"])
    kept = nodes.add("And", [nodes.add("And", [first, likely]), nodes.add("Not", [light])])
    enough = nodes.add("Or", [held, nodes.add("LessOrEqual", [wanted, nodes.last(reached)])])
    return kept, nodes.add("Or", [enough, nodes.last(light)]), weights


def _among(nodes: DrawingNodes, best: _Best, kept: str, weights: str) -> str:
    """What is drawn of the candidates that are kept, their ids rising: `[rows, 1]`."""
    ids, places = nodes.rising(nodes.where(kept, best.ids, nodes.whole(NOBODY)), best.count)
    reached = nodes.up_to(nodes.taken(nodes.where(kept, weights, nodes.real(0.0)), places))
    wanted = nodes.add("Mul", ["share", nodes.last(reached)])
    place = nodes.count(nodes.add("LessOrEqual", [reached, wanted]))
    most = nodes.add("Sub", [nodes.count(kept), nodes.real(1.0)])
    return nodes.taken(ids, nodes.cast(nodes.add("Min", [place, most]), TensorProto.INT64))


if __name__ == "__main__":
    for file, graph in ((FILE, drawing_graph()), (FILE_OF_ALL, drawing_of_all())):
        file.write_bytes(graph.SerializeToString(deterministic=True))
