"""Bounded memory of key-value caches."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qrlora_deploy.errors import InputError, NotReadyError, QrloraError, argument

SMALLEST_CAPACITY = 256
CAPACITY_STEP = 4

SHARE_LEFT = 4
"""Of the memory, one part in so many is not taken for rows that nobody needs yet."""

NO_MEMORY = re.compile(r"out of memory|bad alloc|bad_alloc|failed to allocate|available memory of", re.IGNORECASE)
"""How ONNX Runtime says that there was not enough memory."""


class CacheFullError(NotReadyError):
    """There is no room in the key-value caches, now or ever; the line says which."""


@contextmanager
def refused_without_memory(rows: int) -> Iterator[None]:
    """Where memory ends within a run of so many rows, the caches are full: a CacheFullError."""
    try:
        yield
    except (MemoryError, QrloraError) as error:
        if isinstance(error, QrloraError) and not NO_MEMORY.search(str(error)):
            raise
        raise CacheFullError(
            f"cache full: no memory is left to run {rows} rows; lower {argument('max_cache_bytes')} or "
            f"{argument('max_rows')}, or ask again later"
        ) from error


class Budget:
    """Bytes that are taken and given back.

    Args:
        most: bytes at most.

    Attributes:
        used: bytes that are taken now.
        peak: the most that were taken at once.
    """

    def __init__(self, most: int) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise InputError(f"{argument('max_cache_bytes')} must be a whole number of at least 1, not {most!r:.40}")
        self.most, self.used, self.peak = most, 0, 0

    def fits(self, size_bytes: int) -> bool:
        """Whether so many bytes are free."""
        return self.used + size_bytes <= self.most

    def take(self, size_bytes: int) -> None:
        """Take bytes, which must be free; a negative number gives back."""
        self.used += size_bytes
        assert 0 <= self.used <= self.most, (self.used, self.most)
        self.peak = max(self.peak, self.used)


def row_capacities(longest: int, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """Tokens that a cache row may hold: few sizes, so that rows of one size run in one batch.

    Args:
        longest: tokens that the model takes.
        wanted: the sizes; None: 256, 1,024, 4,096 and so on, and `longest`.

    Raises:
        InputError: one is not between 1 and `longest`.
    """
    if wanted is not None:
        sizes = sorted(set(wanted))
        if not sizes or sizes[0] < 1 or sizes[-1] > longest:
            raise InputError(f"capacities must be from 1 to {longest} tokens, not {list(wanted)}")
        return tuple(sizes)
    sizes = []
    size = SMALLEST_CAPACITY
    while size < longest:
        sizes.append(size)
        size *= CAPACITY_STEP
    return (*sizes, longest)


def without_small(capacities: Sequence[int], rows: int, token_bytes: int, most: int) -> tuple[int, ...]:
    """Capacities without those that save no memory that is needed: all rows fit with the next one.

    Rows of each capacity are run by themselves, and each run reads all weights.

    Args:
        capacities: rising.
        rows: that there may be.
        token_bytes: of a token of one row.
        most: bytes that there are; rows take three quarters of them.
    """
    left = most - most // SHARE_LEFT
    largest = max((size for size in capacities if rows * size * token_bytes <= left), default=0)
    return tuple(size for size in capacities if size >= largest)
