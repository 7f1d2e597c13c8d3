"""How texts without padding lie in a matrix, and the rectangles in which attention sees them."""

from dataclasses import dataclass
from typing import Any

import torch

OWN_RECTANGLE = 8
"""So many texts of one length are a group of their own: another group costs launches, padding costs copies."""
MOST_PADDING = 1.5
"""Places of a padded group by the tokens in it, at most."""


class _Spread(torch.autograd.Function):
    """Rows of a matrix to their places among `size` zero rows; the gradient is their gathering."""

    @staticmethod
    def forward(context: Any, packed: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
        context.save_for_backward(places)
        return packed.new_zeros(size, packed.shape[1]).index_copy_(0, places, packed)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return gradient.index_select(0, context.saved_tensors[0]), None, None


class Gather(torch.autograd.Function):
    """Rows of a matrix, each at most once; so the gradient needs no sums."""

    @staticmethod
    def forward(context: Any, padded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(places)
        context.size = padded.shape[0]
        return padded.index_select(0, places)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        zeros = gradient.new_zeros(context.size, gradient.shape[1])
        return zeros.index_copy_(0, context.saved_tensors[0], gradient), None


@dataclass(frozen=True)
class Group:
    """Texts that attention sees as one rectangle.

    Attributes:
        rows: number of texts.
        length: of the longest one, or more.
        tokens: how many rows of the matrix are theirs.
        mask: `[rows, 1, 1, length]` bool, which places hold tokens; None where all of them do.
        places: `[tokens]` int64, row * length + position; None where every place is in the matrix,
            padding too.
    """

    rows: int
    length: int
    tokens: int
    mask: torch.Tensor | None
    places: torch.Tensor | None

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, width]` to `[rows * length, width]`."""
        return x if self.places is None else _Spread.apply(x, self.places, self.rows * self.length)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows * length, width]` to `[tokens, width]`."""
        return x if self.places is None else Gather.apply(x, self.places)


@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch lie in a matrix `[tokens, width]`.

    Attributes:
        groups: one after another.
        first: `[rows]` int64, the number of each text's first token.
    """

    groups: tuple[Group, ...]
    first: torch.Tensor


def packed_layout(lengths: torch.Tensor) -> Layout:
    """The layout of texts one after another, from their lengths `[rows]` int64 on the CPU, which ascend.

    Texts of one length are a rectangle as they lie, and attention needs neither a mask nor a copy of
    them. Lengths that few texts have share a padded one.
    """
    groups: list[Group] = []
    start = end = tokens = 0
    for length, count in zip(*_runs(lengths), strict=True):
        alone = count >= OWN_RECTANGLE
        # With these texts the pending ones would be padded too much.
        full = (end + count - start) * length > MOST_PADDING * (tokens + count * length)
        if end > start and (alone or full):
            groups.append(_group(lengths[start:end]))
            start, tokens = end, 0
        end, tokens = end + count, tokens + count * length
        if alone:
            groups.append(Group(count, length, count * length, None, None))
            start, tokens = end, 0
    if end > start:
        groups.append(_group(lengths[start:end]))
    return Layout(tuple(groups), lengths.cumsum(0) - lengths)


def _runs(lengths: torch.Tensor) -> tuple[list[int], list[int]]:
    """The lengths that occur, and how often each does."""
    values, counts = lengths.unique_consecutive(return_counts=True)
    return values.tolist(), counts.tolist()


def _group(lengths: torch.Tensor) -> Group:
    rows, length = len(lengths), int(lengths[-1])
    if int(lengths[0]) == length:
        return Group(rows, length, rows * length, None, None)
    mask = torch.arange(length) < lengths[:, None]
    return Group(rows, length, int(lengths.sum()), mask[:, None, None], mask.flatten().nonzero().squeeze(1))


def padded_layout(lengths: torch.Tensor, length: int) -> Layout:
    """The layout of texts padded on the right to `length`; depends on `lengths [rows]` by values only."""
    rows = len(lengths)
    mask = torch.arange(length, device=lengths.device) < lengths[:, None]
    group = Group(rows, length, rows * length, mask[:, None, None], None)
    return Layout((group,), torch.arange(rows, device=lengths.device) * length)
