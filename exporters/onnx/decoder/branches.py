"""Which targets of a basis adapt which product of a decoder, and where their coefficients stand."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.runtime.bundle.row_layout import padded_rank

BLOCKS = "model.layers"
"""Where a decoder keeps its blocks."""


@dataclass(frozen=True)
class Branch:
    """The branches of all targets that one product has, as one pair of products.

    Attributes:
        targets: in the order of their coefficients.
        starts: the first output of each target's layer within the product's.
        outputs: of the product.
    """

    targets: tuple[BasisTarget, ...]
    starts: tuple[int, ...]
    outputs: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """Columns of each target in a table, padded."""
        return tuple(padded_rank(target.rank) for target in self.targets)

    @property
    def rank(self) -> int:
        """Columns of all targets."""
        return sum(self.ranks)

    @property
    def inputs(self) -> int:
        """Of the product."""
        return int(self.targets[0].r.shape[1])

    @property
    def waste(self) -> float:
        """Zeros in `q`, by the weights of the product that it is part of."""
        used = sum(rank * len(target.q) for target, rank in zip(self.targets, self.ranks, strict=True))
        return (self.rank * self.outputs - used) / (self.outputs * self.inputs)

    def r(self) -> np.ndarray:
        """`[in, rank]`: all R beside each other, the padding zero."""
        parts = [
            np.pad(target.r.T, ((0, 0), (0, rank - target.rank)))
            for target, rank in zip(self.targets, self.ranks, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    def q(self) -> np.ndarray:
        """`[rank, outputs]`: all Q, each above the outputs of its layer."""
        whole = np.zeros((self.rank, self.outputs), dtype=np.float32)
        row = 0
        for target, rank, start in zip(self.targets, self.ranks, self.starts, strict=True):
            whole[row : row + target.rank, start : start + len(target.q)] = target.q.T
            row += rank
        return whole


def q_of(target: BasisTarget) -> np.ndarray:
    """`[padded rank, outputs]`: one Q by itself, the padding zero."""
    return np.pad(target.q.T, ((0, padded_rank(target.rank) - target.rank), (0, 0)))


class Branches:
    """The branches of a decoder, by the layers that a product has.

    Args:
        basis: whose targets are adapted; None: nothing is.

    Attributes:
        asked: the branches that were taken, in their order.
        width: columns of a table.
    """

    def __init__(self, basis: Basis | None) -> None:
        targets = basis.targets if basis else ()
        self._targets = {path_of(target.name): target for target in targets}
        starts = np.cumsum([0, *(padded_rank(target.rank) for target in targets)])
        self._columns = {target.name: int(start) for target, start in zip(targets, starts, strict=False)}
        self._left = set(self._targets)
        self.width = int(starts[-1])
        self.asked: list[Branch] = []

    def take(self, layers: Sequence[str], sizes: Sequence[int]) -> Branch | None:
        """The branch of a product with these layers of so many outputs; None: none of them is a target."""
        ends = np.cumsum([0, *sizes])
        found = [
            (self._targets[name], int(end)) for name, end in zip(layers, ends, strict=False) if name in self._targets
        ]
        if not found:
            return None
        found.sort(key=lambda pair: self._columns[pair[0].name])
        branch = Branch(tuple(one for one, _ in found), tuple(start for _, start in found), int(ends[-1]))
        self._left -= set(layers)
        self.asked.append(branch)
        return branch

    def check_all_taken(self) -> None:
        """Refuse, by an InputError, targets that no product has: they would be left out without a word."""
        if self._left:
            raise outside(sorted(self._left)[0])

    def order(self, kept: Sequence[int]) -> np.ndarray:
        """Columns of a table in the order in which the graph uses them.

        Args:
            kept: how many ones stand before the coefficients of each branch; they are in a column behind the table's.
        """
        parts = []
        for branch, ones in zip(self.asked, kept, strict=True):
            parts.append(np.full(ones, self.width))
            parts += [self._columns[one.name] + np.arange(padded_rank(one.rank)) for one in branch.targets]
        return np.concatenate(parts)


def path_of(name: str) -> str:
    """Module path of a target, whether or not its basis was made from the headless model."""
    return name if name.startswith("model.") else f"model.{name}"


def outside(target: str) -> InputError:
    """That a target is none of the layers that a graph adapts."""
    return InputError(
        f"the basis adapts {target}, which a decoder's graph cannot; make a basis of the layers in its blocks "
        f"({argument('targets')} of factorize)"
    )


def names_in_block(layer: int, paths: Iterable[str]) -> list[str]:
    """Module paths of layers of a block."""
    return [f"{BLOCKS}.{layer}.{path}" for path in paths]
