"""Which row of a running batch belongs to whom."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from qrlora_deploy.errors import InputError, argument

Owner = TypeVar("Owner")


class Placement(Generic[Owner]):
    """Rows from 0 on, run in batches of fixed sizes.

    Who joins gets the lowest free row. When fewer rows would do, the ones above move into the gaps below; nobody
    else moves.

    Args:
        buckets: sizes of a batch, rising.

    Attributes:
        rows: owners by row.
        size: rows of a batch now: the smallest bucket that holds them; 0 where there is none.
    """

    def __init__(self, buckets: Sequence[int]) -> None:
        self.buckets = tuple(buckets)
        self.rows: dict[int, Owner] = {}
        self.size = 0

    @property
    def size_after_join(self) -> int | None:
        """Rows of a batch with one more owner; None where no bucket holds so many."""
        return next((size for size in self.buckets if size > len(self.rows)), None)

    def join(self, owner: Owner) -> int:
        """The row of a new owner. There must be room."""
        size = self.size_after_join
        assert size is not None
        self.size = max(self.size, size)
        row = next(row for row in range(self.size) if row not in self.rows)
        self.rows[row] = owner
        return row

    def leave(self, row: int) -> list[tuple[int, int]]:
        """Free a row; returns the rows that move, each from where to where, all into free ones."""
        del self.rows[row]
        self.size = 0 if not self.rows else next(size for size in self.buckets if size >= len(self.rows))
        free = [place for place in range(self.size) if place not in self.rows]
        above = sorted(place for place in self.rows if place >= self.size)
        moves = list(zip(above, free, strict=False))
        for source, target in moves:
            self.rows[target] = self.rows.pop(source)
        return moves


def batch_buckets(most: int, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """Sizes of batches: those that are wanted, or else the powers of two up to `most`, and `most`.

    Raises:
        InputError: one is not positive, or the largest is not `most`.
    """
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise InputError(f"{argument('max_rows')} must be a whole number of at least 1, not {most!r:.40}")
    if wanted is None:
        return tuple(sorted({most, *(2**power for power in range(most.bit_length()) if 2**power < most)}))
    sizes = sorted(set(wanted))
    if not sizes or sizes[0] < 1 or sizes[-1] != most:
        raise InputError(f"batches must be sizes from 1 to {most}, with {most}, not {list(wanted)}")
    return tuple(sizes)
