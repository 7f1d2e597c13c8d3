"""The graph that draws tokens where the logits lie: `python -m exporters.onnx.decoder.drawing FILE` writes it.

It says what `qrlora_deploy.runtime.generation.drawing` says in numpy: the same tokens for the same share, to rounding.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from exporters.onnx.decoder.nodes import Nodes
from qrlora_deploy.runtime.generation.device_draw import (
    ANSWERS,
    CANDIDATES,
    DRAWN,
    IDS,
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
    """Nodes, and the few of them that come again and again."""

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

    def largest(self, name: str, axis: int) -> str:
        """Along an axis, which stays."""
        return self.add("ReduceMax", [name], axes=[axis], keepdims=1)

    def sum(self, name: str, axis: int = 1, keep: int = 1) -> str:
        """Along an axis."""
        return self.add("ReduceSum", [name, self.whole([axis])], keepdims=keep)

    def count(self, name: str) -> str:
        """How many are true along axis 1, fp64."""
        return self.sum(self.cast(name))

    def up_to(self, name: str) -> str:
        """The sum up to each along axis 1."""
        return self.add("CumSum", [name, self.whole(1)])

    def part(self, name: str, start: int, end: int, axis: int = 1) -> str:
        """From start to end along an axis."""
        return self.add("Slice", [name, self.whole([start]), self.whole([end]), self.whole([axis])])

    def last(self, name: str) -> str:
        """Along axis 1."""
        return self.part(name, -1, NOBODY)

    def all_but_last(self, name: str) -> str:
        """Along axis 1."""
        return self.part(name, 0, -1)

    def taken(self, name: str, places: str) -> str:
        """Of each row what stands at its places."""
        return self.add("GatherElements", [name, places], axis=1)

    def where(self, condition: str, first: str, second: str) -> str:
        """One or the other."""
        return self.add("Where", [condition, first, second])


def drawing_graph(candidates: int = CANDIDATES, piece: int = PIECE) -> onnx.ModelProto:
    """The graph.

    Inputs are `logits [rows, vocabulary]` fp32 and `SETTINGS [rows, 1]` fp64; the outputs are `ANSWERS`.

    Args:
        candidates: best logits of each row that are looked at.
        piece: as `PIECE`; 0: the best ones are looked for among all logits at once.
    """
    nodes = _Drawing()
    best = _best(nodes, candidates, piece)
    total, free = _free(nodes, best)
    kept, enough, weights = _kept(nodes, best, total)
    drawn = nodes.where(_unfiltered(nodes), free, _among(nodes, best, kept, weights))
    known = nodes.add("Or", [_unfiltered(nodes), enough])
    # A sum that is no number: a logit is none, or the temperature next to nothing.
    known = nodes.add("And", [known, nodes.add("Less", [total, nodes.real(np.inf)])])
    _name(nodes, nodes.where(known, drawn, nodes.whole(-1)), DRAWN)
    _tell(nodes, best)
    return _model(nodes)


def _blocks(nodes: _Drawing, size: int) -> str:
    """Logits `[rows, blocks, size]`, filled up with what has no weight."""
    vocabulary = nodes.add("Shape", ["logits"], start=1, end=2)
    lacking = nodes.add("Mod", [nodes.add("Neg", [vocabulary]), nodes.whole([size])])
    pads = nodes.add("Concat", [nodes.whole([0, 0, 0]), lacking], axis=0)
    filled = nodes.add("Pad", ["logits", pads, nodes.constant("nothing", -np.inf, np.float32)])
    return nodes.add("Reshape", [filled, nodes.whole([0, -1, size])])


def _best(nodes: _Drawing, candidates: int, piece: int) -> _Best:
    vocabulary = nodes.add("Shape", ["logits"], start=1, end=2)
    count = nodes.add("Min", [vocabulary, nodes.whole([candidates])])
    largest = nodes.largest("logits", 1)
    if not piece:
        values, ids = nodes.add_many("TopK", ["logits", count], 2, axis=1)
        return _Best(values, ids, count, largest)
    # The best ones stand in the pieces whose largest are the best.
    pieces = _blocks(nodes, piece)
    tops = nodes.add("ReduceMax", [pieces], axes=[2], keepdims=0)
    wanted = nodes.add("Min", [nodes.add("Shape", [tops], start=1, end=2), count])
    chosen = nodes.add_many("TopK", [tops, wanted], 2, axis=1)[1]
    # In the order of ids, by which equal ones are told apart.
    chosen = nodes.add_many("TopK", [chosen, wanted], 2, axis=1, largest=0)[0]
    found = nodes.add("GatherND", [pieces, nodes.add("Unsqueeze", [chosen, nodes.whole([2])])], batch_dims=1)
    found = nodes.add("Reshape", [found, nodes.whole([0, -1])])
    values, places = nodes.add_many("TopK", [found, count], 2, axis=1)
    size = nodes.whole(piece)
    first = nodes.add("Mul", [nodes.taken(chosen, nodes.add("Div", [places, size])), size])
    return _Best(values, nodes.add("Add", [first, nodes.add("Mod", [places, size])]), count, largest)


def _unfiltered(nodes: _Drawing) -> str:
    """Whether every token may be drawn: `[rows, 1]`."""
    return nodes.add("Less", ["top_k", nodes.real(0.5)])


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
    block = nodes.cast(
        nodes.count(nodes.add("LessOrEqual", [nodes.all_but_last(reached), wanted])), TensorProto.INT64
    )
    before = nodes.add("Sub", [nodes.taken(reached, block), nodes.taken(sums, block)])
    inside = nodes.cast(nodes.add("GatherND", [weights, block], batch_dims=1))
    rest = nodes.add("Sub", [wanted, before])
    place = nodes.count(nodes.add("LessOrEqual", [nodes.up_to(inside), rest]))
    # A block's sum is rounded otherwise than the sums within, and nothing is drawn that has no weight.
    counted = nodes.constant("places", np.arange(BLOCK)[None], np.float64)
    heavy = nodes.largest(nodes.where(nodes.add("Less", [nodes.real(0.0), inside]), counted, nodes.real(0.0)), 1)
    place = nodes.cast(nodes.add("Min", [place, heavy]), TensorProto.INT64)
    return total, nodes.add("Add", [nodes.add("Mul", [block, nodes.whole(BLOCK)]), place])


def _log_sum(nodes: _Drawing, below: str) -> str:
    """Of the model's own weights, `[rows, 1]` fp64, where the best one's log is 0."""
    return nodes.add("Log", [nodes.sum(nodes.cast(nodes.sum(nodes.add("Exp", [below]), 2, keep=0)))])


def _kept(nodes: _Drawing, best: _Best, total: str) -> tuple[str, str, str]:
    """Which candidates may be drawn, whether there are no others, and the weights of all candidates fp64."""
    below = nodes.add("Sub", [nodes.cast(best.values), nodes.cast(best.largest)])
    weights = nodes.add("Exp", [nodes.add("Div", [below, "temperature"])])
    count = nodes.cast(best.count)
    ranks = nodes.cast(
        nodes.add("Range", [nodes.whole(0), nodes.add("Squeeze", [best.count]), nodes.whole(1)])
    )
    first = nodes.add("Less", [ranks, "top_k"])
    heavy = nodes.where(first, weights, nodes.real(0.0))
    reached = nodes.up_to(heavy)
    all_first = nodes.add("LessOrEqual", ["top_k", count])
    wanted = nodes.add("Mul", ["top_p", nodes.where(all_first, nodes.last(reached), total)])
    likely = nodes.add("Less", [nodes.add("Sub", [reached, heavy]), wanted])
    light = nodes.add("Less", [weights, "min_p"])
    kept = nodes.add("And", [nodes.add("And", [first, likely]), nodes.add("Not", [light])])
    enough = nodes.add("Or", [all_first, nodes.add("LessOrEqual", [wanted, nodes.last(reached)])])
    return kept, nodes.add("Or", [enough, nodes.last(light)]), weights


def _among(nodes: _Drawing, best: _Best, kept: str, weights: str) -> str:
    """What is drawn of the candidates that are kept, their ids rising: `[rows, 1]`."""
    ids = nodes.where(kept, best.ids, nodes.whole(NOBODY))
    ordered, places = nodes.add_many("TopK", [ids, best.count], 2, axis=1, largest=0)
    reached = nodes.up_to(nodes.taken(nodes.where(kept, weights, nodes.real(0.0)), places))
    wanted = nodes.add("Mul", ["share", nodes.last(reached)])
    place = nodes.count(nodes.add("LessOrEqual", [reached, wanted]))
    most = nodes.add("Sub", [nodes.count(kept), nodes.real(1.0)])
    return nodes.taken(ordered, nodes.cast(nodes.add("Min", [place, most]), TensorProto.INT64))


def _tell(nodes: _Drawing, best: _Best) -> None:
    """Logs of the probabilities by the model alone: of what was drawn, and of the best tokens."""
    lost = nodes.add("Add", [nodes.cast(best.largest), "log_sum"])
    place = nodes.add("Max", [DRAWN, nodes.whole(0)])
    _name(nodes, nodes.add("Sub", [nodes.cast(nodes.taken("logits", place)), lost]), LOGPROB)
    _name(nodes, nodes.part(best.ids, 0, TOLD), IDS)
    _name(nodes, nodes.add("Sub", [nodes.cast(nodes.part(best.values, 0, TOLD)), lost]), LOGPROBS)


def _name(nodes: _Drawing, output: str, name: str) -> None:
    """Give what the last node has made another name."""
    assert nodes.nodes[-1].output[0] == output
    nodes.nodes[-1].output[0] = name


def _model(nodes: _Drawing) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    inputs = [value("logits", TensorProto.FLOAT, ["rows", "vocabulary"])]
    inputs += [value(name, TensorProto.DOUBLE, ["rows", 1]) for name in SETTINGS]
    kinds = {DRAWN: TensorProto.INT64, IDS: TensorProto.INT64}
    outputs = [
        value(name, kinds.get(name, TensorProto.DOUBLE), ["rows", 1 if width == 1 else "told"])
        for name, width in ANSWERS.items()
    ]
    graph = helper.make_graph(nodes.nodes, "drawing", inputs, outputs, list(nodes.initializers.values()))
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="qrlora-deploy"
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(drawing_graph().SerializeToString(deterministic=True))
