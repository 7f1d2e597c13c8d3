"""Nodes of the graphs that draw tokens where the logits lie: what several of them compute."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from exporters.onnx.decoder.nodes import Nodes
from qrlora_deploy.runtime.generation.wishes import ANSWERS, LOGITS, SETTINGS

OPSET, IR_VERSION = 17, 8

BLOCK = 256
"""Weights that are summed up before they are looked at one by one."""

NOBODY = 2**62
"""More than any id."""

APART = 2.0**-43
"""By so much of itself, for every place behind the first, a logit counts less than an equal one: in fp64, where that
takes none of fp32 past another."""

LEAST = 1e-60
"""The same for zeros, far below what fp32 can tell from them."""


class DrawingNodes(Nodes):
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

    def named(self, output: str, name: str) -> str:
        """What the last node has made, under another name."""
        assert self.nodes[-1].output[0] == output
        self.nodes[-1].output[0] = name
        return name

    def blocks(self, size: int) -> str:
        """Logits `[rows, blocks, size]`, filled up with what has no weight."""
        lacking = self.add("Mod", [self.add("Neg", [self.size(LOGITS)]), self.whole([size])])
        pads = self.add("Concat", [self.whole([0, 0, 0]), lacking], axis=0)
        filled = self.add("Pad", [LOGITS, pads, self.constant("nothing", -np.inf, np.float32)])
        return self.add("Reshape", [filled, self.whole([0, -1, size])])

    def scaled(self, below: str) -> str:
        """Logs of weights, of logits less the largest."""
        heat = self.add("Unsqueeze", [self.cast("temperature", TensorProto.FLOAT), self.whole([2])])
        return self.add("Div", [below, heat])

    def block_sums(self, blocks: str) -> str:
        """Of fp32 `[rows, blocks, size]`: `[rows, blocks]` fp64."""
        return self.cast(self.sum(blocks, 2, keep=0))

    def block_of(self, reached: str, wanted: str) -> str:
        """The first block `[rows, 1]` whose sum up to it passes what is wanted; the last one where none does."""
        most = self.cast(self.add("Sub", [self.size(reached), self.whole(1)]))
        passed = self.count(self.add("LessOrEqual", [reached, wanted]))
        return self.cast(self.add("Min", [passed, most]), TensorProto.INT64)

    def place(self, blocks: str, share: str) -> tuple[str, str]:
        """Where the sum of weights `[rows, blocks, BLOCK]` passes a share of the whole sum; and that sum, fp64."""
        sums = self.block_sums(blocks)
        reached = self.up_to(sums)
        total = self.last(reached)
        wanted = self.add("Mul", [share, total])
        block = self.block_of(reached, wanted)
        before = self.add("Sub", [self.taken(reached, block), self.taken(sums, block)])
        inside = self.cast(self.taken_blocks(blocks, block, BLOCK))
        place = self.count(self.add("LessOrEqual", [self.up_to(inside), self.add("Sub", [wanted, before])]))
        # A block's sum is rounded otherwise than the sums within, and nothing is drawn that has no weight.
        places = self.constant("places", np.arange(BLOCK)[None], np.float64)
        heavy = self.largest(self.where(self.add("Less", [self.real(0.0), inside]), places, self.real(0.0)), 1)
        place = self.cast(self.add("Min", [place, heavy]), TensorProto.INT64)
        return self.add("Add", [self.add("Mul", [block, self.whole(BLOCK)]), place]), total

    def log_sum(self, below: str) -> str:
        """Of the model's own weights, `[rows, 1]` fp64, where the best one's log is 0."""
        return self.add("Log", [self.sum(self.block_sums(self.add("Exp", [below])))])

    def logprob(self, drawn: str, lost: str) -> str:
        """Of what was drawn, by the model alone."""
        place = self.add("Max", [drawn, self.whole(0)])
        return self.add("Sub", [self.cast(self.taken(LOGITS, place)), lost])

    def known(self, drawn: str, known: str, total: str) -> str:
        """What was drawn, or -1 where that is not known, or a sum is no number: a logit is none, or the temperature
        is next to nothing."""
        finite = self.add("Less", [total, self.real(np.inf)])
        return self.where(self.add("And", [known, finite]), drawn, self.whole(-1))

    def model(self, name: str, answers: Iterable[str]) -> onnx.ModelProto:
        """The graph, with the answers of these names."""
        value = helper.make_tensor_value_info
        inputs = [value(LOGITS, TensorProto.FLOAT, ["rows", "vocabulary"])]
        inputs += [value(setting, TensorProto.DOUBLE, ["rows", 1]) for setting in SETTINGS]
        outputs = [_value(answer, *ANSWERS[answer]) for answer in answers]
        graph = helper.make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qrlora-deploy")


def _value(name: str, kind: Any, width: int) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    return helper.make_tensor_value_info(name, element, ["rows", 1 if width == 1 else "told"])
