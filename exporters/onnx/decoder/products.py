"""Products of a decoder: one matrix for all layers that read one input, with their branches as one more."""

from collections.abc import Sequence

import numpy as np

from exporters.onnx.decoder.branches import Branch, Branches
from exporters.onnx.decoder.nodes import Nodes
from exporters.onnx.decoder.tensors import Tensors
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.factorization.decomposition import update
from qrlora_deploy.formats.basis import Basis, BasisTarget


class Products:
    """Makes products; the order in which they are asked for is that of the coefficients.

    Args:
        nodes: the graph.
        tensors: of the base.
        branches: a customer per row; without targets where the bundle is merged.
        folds: a customer to fold in, by module path.
    """

    def __init__(
        self, nodes: Nodes, tensors: Tensors, branches: Branches, folds: dict[str, tuple[BasisTarget, np.ndarray]]
    ) -> None:
        self._nodes, self._tensors, self._branches, self._folds = nodes, tensors, branches, folds
        self._folded: set[str] = set()
        self.parts: list[str] = []
        """Names of the coefficients of each branch `[batch, 1, rank]`, to be taken in turn."""

    def multiply(self, x: str, layers: Sequence[str]) -> str:
        """`[batch, tokens, in]` to the outputs of all `layers` beside each other."""
        sizes = [self._tensors.shape(f"{layer}.weight")[0] for layer in layers]
        branch = self._branches.take(layers, sizes)
        name = _common(layers)
        if branch is None:
            y = self._nodes.add("MatMul", [x, self._nodes.weight(f"{name}.weight", lambda: self._packed(layers))])
        else:
            y = self._with_branch(x, layers, branch, name)
        return self._with_bias(y, layers, name)

    def check_all_folded(self) -> None:
        """Refuse, by an InputError, targets that no product has: the customer would be lost in part."""
        if self._folds.keys() - self._folded:
            raise InputError(
                f"the basis adapts {sorted(self._folds.keys() - self._folded)[0]}, which a decoder's graph cannot; make "
                f"a basis of the layers in its blocks ({argument('targets')} of factorize)"
            )

    def _with_branch(self, x: str, layers: Sequence[str], branch: Branch, name: str) -> str:
        """`[x, c * (x R)] [W; Q]`: one product gives base and branch, and nothing has to be added."""
        nodes = self._nodes
        coefficients = f"coefficients_{len(self.parts)}"
        self.parts.append(coefficients)
        projected = nodes.add("MatMul", [x, nodes.weight(f"{name}.R", branch.r)])
        scaled = nodes.add("Mul", [projected, coefficients])
        both = nodes.add("Concat", [x, scaled], axis=-1)
        weight = nodes.weight(f"{name}.weight_and_Q", lambda: self._stacked(layers, branch))
        return nodes.add("MatMul", [both, weight])

    def _with_bias(self, y: str, layers: Sequence[str], name: str) -> str:
        if not any(self._tensors.has(f"{layer}.bias") for layer in layers):
            return y
        return self._nodes.add("Add", [y, self._nodes.weight(f"{name}.bias", lambda: self._biases(layers))])

    def _packed(self, layers: Sequence[str]) -> np.ndarray:
        """`[in, out]` of all layers."""
        return np.concatenate([self._merged(layer).T for layer in layers], axis=1)

    def _stacked(self, layers: Sequence[str], branch: Branch) -> np.ndarray:
        packed = self._packed(layers)
        return np.concatenate([packed, branch.q().astype(self._nodes.dtype)], axis=0)

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
    parts = basis.split(values)
    return {
        (name if name.startswith("model.") else f"model.{name}"): (target, parts[target.name])
        for target in basis.targets
        for name in [target.name]
    }


def _common(layers: Sequence[str]) -> str:
    """One name for several layers of a block: their block and their own last parts."""
    block, _, _ = layers[0].rpartition(".")
    return f"{block}.{'_'.join(layer.rpartition('.')[2].removesuffix('_proj') for layer in layers)}"
