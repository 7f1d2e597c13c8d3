"""Which targets of a basis adapt which product of a decoder, and where their coefficients stand."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.runtime.bundle.row_layout import padded_rank

MOST_ZEROS = 8_000_000
"""By which the branches of one product may grow in all blocks together, to be of one width: 16 MB take a GPU 5 us."""

BLOCKS = "model.layers"
"""Where a decoder keeps its blocks."""


@dataclass(frozen=True)
class Branch:
    """The branches of all targets that one product has, as one pair of products.

    Attributes:
        targets: in the order of their coefficients.
        starts: the first output of each target's layer within the product's.
        outputs: of the product.
        width: columns of R, at least as many as the targets have; what is more is zero.
        level: whether the branches of this product have one width in all blocks.
    """

    targets: tuple[BasisTarget, ...]
    starts: tuple[int, ...]
    outputs: int
    width: int
    level: bool

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
        """`[in, width]`: all R beside each other, the padding zero."""
        parts = [
            np.pad(target.r.T, ((0, 0), (0, rank - target.rank)))
            for target, rank in zip(self.targets, self.ranks, strict=True)
        ]
        return np.pad(np.concatenate(parts, axis=1), ((0, 0), (0, self.width - self.rank)))

    def q(self) -> np.ndarray:
        """`[width, outputs]`: all Q, each above the outputs of its layer."""
        whole = np.zeros((self.width, self.outputs), dtype=np.float32)
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
        level: widen the branches of a product to those of its widest block, where that costs little: on a GPU.

    Attributes:
        width: columns of a table.
    """

    def __init__(self, basis: Basis | None, level: bool = False) -> None:
        self._level = level
        targets = basis.targets if basis else ()
        self._targets = {path_of(target.name): target for target in targets}
        starts = np.cumsum([0, *(padded_rank(target.rank) for target in targets)])
        self._columns = {target.name: int(start) for target, start in zip(targets, starts, strict=False)}
        self._left = set(self._targets)
        self.width = int(starts[-1])

    def take(self, layers: Sequence[str], sizes: Sequence[int]) -> Branch | None:
        """The branch of a product with these layers of so many outputs; None: none of them is a target."""
        ends = np.cumsum([0, *sizes])
        found = [
            (self._targets[name], int(end)) for name, end in zip(layers, ends, strict=False) if name in self._targets
        ]
        if not found:
            return None
        found.sort(key=lambda pair: self._columns[pair[0].name])
        targets = tuple(one for one, _ in found)
        width, level = self._width(layers, targets, int(ends[-1]))
        self._left -= set(layers)
        return Branch(targets, tuple(start for _, start in found), int(ends[-1]), width, level)

    def _width(self, layers: Sequence[str], targets: Sequence[BasisTarget], outputs: int) -> tuple[int, bool]:
        """Columns of R in this block, and whether those of all blocks are as many."""
        kinds = {_within_block(layer) for layer in layers}
        ranks: dict[str, int] = {}
        for path, target in self._targets.items():
            if _within_block(path) in kinds:
                block = path.removesuffix(_within_block(path))
                ranks[block] = ranks.get(block, 0) + padded_rank(target.rank)
        widest = max(ranks.values())
        zeros = sum(widest - rank for rank in ranks.values()) * (outputs + targets[0].r.shape[1])
        if self._level and zeros <= MOST_ZEROS:
            return widest, True
        return sum(padded_rank(target.rank) for target in targets), False

    def check_all_taken(self) -> None:
        """Refuse, by an InputError, targets that no product has: they would be left out without a word."""
        if self._left:
            raise outside(sorted(self._left)[0])

    def columns(self, branch: Branch, ones: int) -> np.ndarray:
        """Columns of a table that a branch multiplies with, in its order.

        Args:
            ones: how many ones stand before its coefficients; they are in a column behind the table's.
        """
        parts = [np.full(ones, self.width)]
        parts += [self._columns[one.name] + np.arange(padded_rank(one.rank)) for one in branch.targets]
        # What a column of zeros in R is multiplied with is all the same.
        parts.append(np.full(branch.width - branch.rank, self._columns[branch.targets[0].name]))
        return np.concatenate(parts)


def path_of(name: str) -> str:
    """Module path of a target, whether or not its basis was made from the headless model."""
    return name if name.startswith("model.") else f"model.{name}"


def _within_block(path: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`."""
    return path.removeprefix(f"{BLOCKS}.").partition(".")[2]


def outside(target: str) -> InputError:
    """That a target is none of the layers that a graph adapts."""
    return InputError(
        f"the basis adapts {target}, which a decoder's graph cannot; make a basis of the layers in its blocks "
        f"({argument('targets')} of factorize)"
    )


def names_in_block(layer: int, paths: Iterable[str]) -> list[str]:
    """Module paths of layers of a block."""
    return [f"{BLOCKS}.{layer}.{path}" for path in paths]
