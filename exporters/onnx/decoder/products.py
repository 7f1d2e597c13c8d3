"""Products of a decoder: one matrix for all layers that read one input, with their branches as one more."""

from collections.abc import Callable, Sequence

import numpy as np

from exporters.onnx.decoder.blockwise import blockwise
from exporters.onnx.decoder.branches import Branch, Branches, outside, path_of, q_of
from exporters.onnx.decoder.coefficients import Part
from exporters.onnx.decoder.nodes import Nodes
from exporters.onnx.decoder.tensors import Tensors, transposed
from qrlora_deploy.factorization.decomposition import update
from qrlora_deploy.formats.basis import Basis, BasisTarget

MOST_WASTE = 0.02
"""Zeros, by a product's weights, that joint branches may bring where a graph is for the CPU, on which bytes cost more
than operators; on a GPU it is the other way round, and branches are always joint. SmolLM2-135M's q and v would bring
0.14: apart they save 6 % of a token in fp32, and 5 % of one with weights of 4 bits."""

MOST_KEPT, MOST_KEPT_OF_LONG_SUMS = 1024, 2048
"""Width of an input or output that a graph for a GPU takes through the products of its branch, to have one operator
less: an identity of that size costs less bandwidth than an operator costs time, some 2 us."""

LONG_SUM = 4096
"""From wider inputs on, a GPU computes R in parts that another kernel adds up: two operators less."""


class Products:
    """Makes products; the order in which they are asked for is that of the coefficients.

    Args:
        nodes: the graph.
        tensors: of the base.
        branches: a customer per row; without targets where the bundle is merged.
        folds: a customer to fold in, by module path.
        bits: of the weights, 4 or 8; 0: they are not quantised.
    """

    def __init__(
        self,
        nodes: Nodes,
        tensors: Tensors,
        branches: Branches,
        folds: dict[str, tuple[BasisTarget, np.ndarray]],
        bits: int = 0,
    ) -> None:
        self._bits = bits
        self._most_waste = MOST_WASTE if nodes.dtype == np.float32 else np.inf
        self._nodes, self._tensors, self._branches, self._folds = nodes, tensors, branches, folds
        self._folded: set[str] = set()
        self.parts: list[Part] = []
        """What each branch multiplies with."""

    def multiply(self, x: str, layers: Sequence[str]) -> list[str]:
        """`[batch, tokens, in]` to the outputs of all `layers` beside each other, or to those of each."""
        sizes = [self._tensors.shape(f"{layer}.weight")[0] for layer in layers]
        branch = self._branches.take(layers, sizes)
        if branch is None:
            return [self._with_bias(self._plain(x, layers), layers)]
        if kept := self._width_to_keep(branch):
            return [self._with_bias(self._within(x, layers, branch, kept), layers)]
        scaled = self._scaled(x, layers, branch)
        if branch.waste <= self._most_waste:
            return [self._with_bias(self._extended(x, scaled, layers, branch.q), layers)]
        return self._each(x, scaled, layers, branch)

    def one(self, x: str, layer: str) -> str:
        """The outputs of a single layer."""
        return self.multiply(x, [layer])[0]

    def check_all_folded(self) -> None:
        """Refuse, by an InputError, targets that no product has: the customer would be lost in part."""
        left = sorted(self._folds.keys() - self._folded)
        if left:
            raise outside(left[0])

    def _plain(self, x: str, layers: Sequence[str]) -> str:
        name = f"{_common(layers)}.weight"
        if self._bits:
            shapes = [self._tensors.shape(f"{layer}.weight") for layer in layers]
            shape = sum(rows for rows, _ in shapes), shapes[0][1]
            return blockwise(self._nodes, x, name, shape, lambda: self._rows(layers), self._bits)
        return self._nodes.add("MatMul", [x, self._nodes.weight(name, lambda: self._packed(layers))])

    def _width_to_keep(self, branch: Branch) -> int:
        """Of the input or output that goes through the products of a branch; 0: none does."""
        narrow = min(branch.inputs, branch.outputs)
        most = MOST_KEPT_OF_LONG_SUMS if branch.inputs > LONG_SUM else MOST_KEPT
        return narrow if self._nodes.dtype != np.float32 and narrow <= most else 0

    def _within(self, x: str, layers: Sequence[str], branch: Branch, kept: int) -> str:
        """`(1, c) * (x [1, R])`, then `[W; Q]`: with an identity beside R, `x` need not be put beside `c * (x R)`.

        Where the output is the narrower one the identity stands above Q, and W beside R.
        """
        nodes, name, first = self._nodes, _common(layers), kept == branch.inputs

        def identity() -> np.ndarray:
            return np.eye(kept, dtype=nodes.dtype)

        def grown() -> np.ndarray:
            left = identity() if first else self._packed(layers)
            return np.concatenate([left, branch.r().astype(nodes.dtype)], axis=1)

        def shrunk() -> np.ndarray:
            above = self._packed(layers) if first else identity()
            return np.concatenate([above, branch.q().astype(nodes.dtype)], axis=0)

        wide = nodes.add("MatMul", [x, nodes.weight(f"{name}.beside_R", grown)])
        scaled = nodes.add("Mul", [wide, self._coefficients(branch, kept)])
        return nodes.add("MatMul", [scaled, nodes.weight(f"{name}.above_Q", shrunk)])

    def _coefficients(self, branch: Branch, kept: int = 0) -> str:
        self.parts.append(Part(f"coefficients_{len(self.parts)}", branch, kept))
        return self.parts[-1].name

    def _scaled(self, x: str, layers: Sequence[str], branch: Branch) -> str:
        """`c * (x R)` of all targets that read `x`."""
        nodes = self._nodes
        projected = nodes.add("MatMul", [x, nodes.weight(f"{_common(layers)}.R", branch.r)])
        return nodes.add("Mul", [projected, self._coefficients(branch)])

    def _extended(self, x: str, scaled: str, layers: Sequence[str], q: Callable[[], np.ndarray]) -> str:
        """`[x, scaled] [W; Q]`: one product gives base and branch, and nothing has to be added.

        A quantised W has a product of its own, as the branch stays in full.
        """
        if self._bits:
            factor = self._nodes.weight(f"{_common(layers)}.Q", q)
            return self._nodes.add("Add", [self._plain(x, layers), self._nodes.add("MatMul", [scaled, factor])])
        both = self._nodes.add("Concat", [x, scaled], axis=-1)

        def stacked() -> np.ndarray:
            return np.concatenate([self._packed(layers), q().astype(self._nodes.dtype)], axis=0)

        return self._nodes.add("MatMul", [both, self._nodes.weight(f"{_common(layers)}.weight_and_Q", stacked)])

    def _each(self, x: str, scaled: str, layers: Sequence[str], branch: Branch) -> list[str]:
        """Every layer by itself, with what belongs to it of `scaled`."""
        nodes = self._nodes
        sizes = nodes.constant(f"{_common(layers)}.ranks", branch.ranks, np.int64)
        parts = (
            nodes.add_many("Split", [scaled, sizes], len(branch.ranks), axis=-1) if len(branch.ranks) > 1 else [scaled]
        )
        own = {path_of(target.name): (part, target) for target, part in zip(branch.targets, parts, strict=True)}

        def output(layer: str) -> str:
            if layer not in own:
                return self._plain(x, [layer])
            part, target = own[layer]
            return self._extended(x, part, [layer], lambda: q_of(target))

        return [self._with_bias(output(layer), [layer]) for layer in layers]

    def _with_bias(self, y: str, layers: Sequence[str]) -> str:
        if not any(self._tensors.has(f"{layer}.bias") for layer in layers):
            return y
        bias = self._nodes.weight(f"{_common(layers)}.bias", lambda: self._biases(layers))
        return self._nodes.add("Add", [y, bias])

    def _packed(self, layers: Sequence[str]) -> np.ndarray:
        """`[in, out]` of all layers."""
        return transposed(self._rows(layers))

    def _rows(self, layers: Sequence[str]) -> np.ndarray:
        """`[out, in]` of all layers."""
        return np.concatenate([self._merged(layer) for layer in layers])

    def _merged(self, layer: str) -> np.ndarray:
        """`[out, in]` in the graph's dtype, the customer folded in in fp64 and rounded once."""
        weight = self._tensors.read(f"{layer}.weight")
        if layer not in self._folds:
            return weight.astype(self._nodes.dtype)
        self._folded.add(layer)
        target, c = self._folds[layer]
        change = update(target.q.astype(np.float64), c.astype(np.float64), target.r.astype(np.float64))
        return (weight.astype(np.float64) + change).astype(self._nodes.dtype)

    def _biases(self, layers: Sequence[str]) -> np.ndarray:
        names = [f"{layer}.bias" for layer in layers]
        sizes = [self._tensors.shape(f"{layer}.weight")[0] for layer in layers]
        read = [self._tensors.read(name) if self._tensors.has(name) else None for name in names]
        parts = [np.zeros(size) if bias is None else bias for bias, size in zip(read, sizes, strict=True)]
        return np.concatenate([part.astype(np.float32) for part in parts])


def folds_of(basis: Basis, values: np.ndarray) -> dict[str, tuple[BasisTarget, np.ndarray]]:
    """A customer's `values [total_rank]` by module path."""
    parts = basis.split(values) if basis.targets else {}
    return {path_of(target.name): (target, parts[target.name]) for target in basis.targets}


def _common(layers: Sequence[str]) -> str:
    """One name for several layers of a block: their block and their own last parts."""
    block, _, _ = layers[0].rpartition(".")
    return f"{block}.{'_'.join(layer.rpartition('.')[2].removesuffix('_proj') for layer in layers)}"
