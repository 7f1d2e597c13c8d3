"""The graph that draws tokens where the logits lie: `python -m exporters.onnx.decoder.drawing FILE` writes it.

It says what `qrlora_deploy.runtime.generation.drawing` says in numpy: the same tokens for the same share, to rounding.
It is written so that runs can be captured on a GPU, and no result is left to the order in which a GPU finds equal ones.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from exporters.onnx.decoder.nodes import Nodes
from qrlora_deploy.runtime.generation.wishes import (
    ANSWERS,
    CANDIDATES,
    DRAWN,
    IDS,
    LOGITS,
    LOGPROB,
    LOGPROBS,
    SETTINGS,
    TOLD,
)

OPSET, IR_VERSION = 17, 8

BLOCK = 256
"""Weights that are summed up before they are looked at one by one."""

PIECE = 32
"""Logits of which one, the largest, stands for all where the best ones are looked for."""

NOBODY = 2**62
"""More than any id."""

APART = 2.0**-43
"""By so much of itself, for every place behind the first, a logit counts less than an equal one: in fp64, where that
takes none of fp32 past another."""

LEAST = 1e-60
"""The same for zeros, far below what fp32 can tell from them."""


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


class _Drawing(Nodes):
    """Nodes, and those few that come again and again."""

    def __init__(self) -> None:
        super().__init__(None, np.float32)

    def whole(self, values: int | Sequence[int]) -> str:
        """A constant int64."""
        return self.constant(f"whole_{values}".replace(" ", ""), values, np.int64)

    def real(self, value: float) -> str:
        """A constant fp64."""
        return self.constant(f"real_{value}", value, np.float64)

    def cast(self, name: str, dtype: int = TensorProto.DOUBLE) -> str:
        """As another type."""
        return self.add("Cast", [name], to=dtype)

    def size(self, name: str) -> str:
        """Along axis 1, int64 `[1]`: a number that ONNX Runtime knows beforehand where it knows the vocabulary."""
        return self.add("Shape", [self.add("Gather", [name, self.whole(0)], axis=0)], start=0, end=1)

    def counted(self, size: str) -> str:
        """`[size]` fp64: 0, 1, 2 and so on."""
        return self.cast(self.add("Range", [self.whole(0), self.add("Squeeze", [size]), self.whole(1)]))

    def largest(self, name: str, axis: int, keep: int = 1) -> str:
        """Along an axis."""
        return self.add("ReduceMax", [name], axes=[axis], keepdims=keep)

    def sum(self, name: str, axis: int = 1, keep: int = 1) -> str:
        """Along an axis."""
        return self.add("ReduceSum", [name, self.whole([axis])], keepdims=keep)

    def count(self, name: str) -> str:
        """How many are true along axis 1, fp64."""
        return self.sum(self.cast(name))

    def up_to(self, name: str) -> str:
        """The sum up to each along axis 1."""
        return self.add("CumSum", [name, self.whole(1)])

    def part(self, name: str, start: int, end: int) -> str:
        """From start to end along axis 1."""
        return self.add("Slice", [name, self.whole([start]), self.whole([end]), self.whole([1])])

    def last(self, name: str) -> str:
        """Along axis 1."""
        return self.part(name, -1, NOBODY)

    def where(self, condition: str, first: str, second: str) -> str:
        """One or the other."""
        return self.add("Where", [condition, first, second])

    def taken(self, name: str, places: str) -> str:
        """Of each row what stands at its places."""
        return self.add("GatherElements", [name, places], axis=1)

    def taken_blocks(self, blocks: str, places: str, size: int) -> str:
        """Of each row of `[rows, many, size]` the blocks at `places [rows, count]`, one behind the other."""
        ones = self.add("Add", [self.add("Mul", [self.part(places, 0, 1), self.whole(0)]), self.whole(1)])
        rows = self.add("CumSum", [ones, self.whole(0)], exclusive=1)
        flat = self.add("Add", [self.add("Mul", [rows, self.size(blocks)]), places])
        found = self.add("Gather", [self.add("Reshape", [blocks, self.whole([-1, size])]), flat], axis=0)
        return self.add("Reshape", [found, self.whole([0, -1])])

    def ranked(self, values: str, count: str) -> str:
        """Places `[rows, count]` of the largest, the largest first, of equal ones the first."""
        exact = self.cast(values)
        less = self.add("Add", [self.add("Mul", [self.add("Abs", [exact]), self.real(APART)]), self.real(LEAST)])
        places = self.add("Add", [self.counted(self.size(values)), self.real(1.0)])
        keys = self.add("Sub", [exact, self.add("Mul", [less, places])])
        return self.add_many("TopK", [keys, count], 2, axis=1)[1]

    def rising(self, names: str, count: str) -> tuple[str, str]:
        """All `count` of them, the lowest first, and where they stood."""
        values, places = self.add_many("TopK", [names, count], 2, axis=1, largest=0)
        return values, places


def drawing_graph(candidates: int = CANDIDATES, piece: int = PIECE) -> onnx.ModelProto:
    """The graph: inputs are `LOGITS [rows, vocabulary]` fp32 and `SETTINGS [rows, 1]` fp64, outputs `ANSWERS`.

    Args:
        candidates: best logits of each row that are looked at.
        piece: as `PIECE`.
    """
    nodes = _Drawing()
    best = _best(nodes, candidates, piece)
    total, free = _free(nodes, best)
    kept, enough, weights = _kept(nodes, best, total)
    unfiltered = nodes.add("Less", ["top_k", nodes.real(0.5)])
    drawn = nodes.where(unfiltered, free, _among(nodes, best, kept, weights))
    known = nodes.add("Or", [unfiltered, enough])
    # A sum that is no number: a logit is none, or the temperature is next to nothing.
    known = nodes.add("And", [known, nodes.add("Less", [total, nodes.real(np.inf)])])
    _name(nodes, nodes.where(known, drawn, nodes.whole(-1)), DRAWN)
    _tell(nodes, best)
    return _model(nodes)


def _blocks(nodes: _Drawing, size: int) -> str:
    """Logits `[rows, blocks, size]`, filled up with what has no weight."""
    lacking = nodes.add("Mod", [nodes.add("Neg", [nodes.size(LOGITS)]), nodes.whole([size])])
    pads = nodes.add("Concat", [nodes.whole([0, 0, 0]), lacking], axis=0)
    filled = nodes.add("Pad", [LOGITS, pads, nodes.constant("nothing", -np.inf, np.float32)])
    return nodes.add("Reshape", [filled, nodes.whole([0, -1, size])])


def _best(nodes: _Drawing, candidates: int, piece: int) -> _Best:
    """They stand in the pieces whose largest are the best."""
    pieces = _blocks(nodes, piece)
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


def _free(nodes: _Drawing, best: _Best) -> tuple[str, str]:
    """The sum of all weights fp64, and what is drawn of all tokens, `[rows, 1]` both."""
    blocks = _blocks(nodes, BLOCK)
    below = nodes.add("Sub", [blocks, nodes.add("Unsqueeze", [best.largest, nodes.whole([2])])])
    heat = nodes.add("Unsqueeze", [nodes.cast("temperature", TensorProto.FLOAT), nodes.whole([2])])
    weights = nodes.add("Exp", [nodes.add("Div", [below, heat])])
    _name(nodes, _log_sum(nodes, below), "log_sum")
    sums = nodes.cast(nodes.sum(weights, 2, keep=0))
    reached = nodes.up_to(sums)
    total = nodes.last(reached)
    wanted = nodes.add("Mul", ["share", total])
    most = nodes.cast(nodes.add("Sub", [nodes.size(sums), nodes.whole(1)]))
    passed = nodes.count(nodes.add("LessOrEqual", [reached, wanted]))
    block = nodes.cast(nodes.add("Min", [passed, most]), TensorProto.INT64)
    before = nodes.add("Sub", [nodes.taken(reached, block), nodes.taken(sums, block)])
    inside = nodes.cast(nodes.taken_blocks(weights, block, BLOCK))
    place = nodes.count(nodes.add("LessOrEqual", [nodes.up_to(inside), nodes.add("Sub", [wanted, before])]))
    # A block's sum is rounded otherwise than the sums within, and nothing is drawn that has no weight.
    places = nodes.constant("places", np.arange(BLOCK)[None], np.float64)
    heavy = nodes.largest(nodes.where(nodes.add("Less", [nodes.real(0.0), inside]), places, nodes.real(0.0)), 1)
    place = nodes.cast(nodes.add("Min", [place, heavy]), TensorProto.INT64)
    return total, nodes.add("Add", [nodes.add("Mul", [block, nodes.whole(BLOCK)]), place])


def _log_sum(nodes: _Drawing, below: str) -> str:
    """Of the model's own weights, `[rows, 1]` fp64, where the best one's log is 0."""
    return nodes.add("Log", [nodes.sum(nodes.cast(nodes.sum(nodes.add("Exp", [below]), 2, keep=0)))])


def _kept(nodes: _Drawing, best: _Best, total: str) -> tuple[str, str, str]:
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


def _among(nodes: _Drawing, best: _Best, kept: str, weights: str) -> str:
    """What is drawn of the candidates that are kept, their ids rising: `[rows, 1]`."""
    ids, places = nodes.rising(nodes.where(kept, best.ids, nodes.whole(NOBODY)), best.count)
    reached = nodes.up_to(nodes.taken(nodes.where(kept, weights, nodes.real(0.0)), places))
    wanted = nodes.add("Mul", ["share", nodes.last(reached)])
    place = nodes.count(nodes.add("LessOrEqual", [reached, wanted]))
    most = nodes.add("Sub", [nodes.count(kept), nodes.real(1.0)])
    return nodes.taken(ids, nodes.cast(nodes.add("Min", [place, most]), TensorProto.INT64))


def _tell(nodes: _Drawing, best: _Best) -> None:
    """Logs of the probabilities by the model alone: of what was drawn, and of the best tokens."""
    lost = nodes.add("Add", [nodes.cast(best.largest), "log_sum"])
    place = nodes.add("Max", [DRAWN, nodes.whole(0)])
    _name(nodes, nodes.add("Sub", [nodes.cast(nodes.taken(LOGITS, place)), lost]), LOGPROB)
    _name(nodes, nodes.part(best.ids, 0, TOLD), IDS)
    _name(nodes, nodes.add("Sub", [nodes.cast(nodes.part(best.values, 0, TOLD)), lost]), LOGPROBS)


def _name(nodes: _Drawing, output: str, name: str) -> None:
    """Give what the last node has made another name."""
    assert nodes.nodes[-1].output[0] == output
    nodes.nodes[-1].output[0] = name


def _model(nodes: _Drawing) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    inputs = [value(LOGITS, TensorProto.FLOAT, ["rows", "vocabulary"])]
    inputs += [value(name, TensorProto.DOUBLE, ["rows", 1]) for name in SETTINGS]
    outputs = [
        value(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), ["rows", 1 if width == 1 else "told"])
        for name, (kind, width) in ANSWERS.items()
    ]
    graph = helper.make_graph(nodes.nodes, "drawing", inputs, outputs, list(nodes.initializers.values()))
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="qrlora-deploy"
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(drawing_graph().SerializeToString(deterministic=True))
