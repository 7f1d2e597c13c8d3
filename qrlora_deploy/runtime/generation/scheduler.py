"""Who waits, who has a row of a cache, and how much memory the caches take."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qrlora_deploy.errors import argument
from qrlora_deploy.runtime.generation.budget import SHARE_LEFT, Budget, CacheFullError
from qrlora_deploy.runtime.generation.placement import Placement


class Rows(Protocol):
    """The memory of rows of one capacity, as far as it matters here; `KvCache` is one."""

    rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""

    def resize(self, rows: int) -> None:
        """Have memory for so many rows; a MemoryError leaves things as they were."""

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a row to another one."""


@dataclass(eq=False)
class Seat:
    """The place of one request.

    Attributes:
        owner: whose it is.
        needed: tokens that it may come to.
        capacity: tokens of its row.
        row: its row; None while it waits.
        past: tokens in the row.
    """

    owner: Any
    needed: int
    capacity: int
    row: int | None = None
    past: int = 0


@dataclass(eq=False)
class Group:
    """The rows of one capacity, which run together."""

    cache: Any
    placement: Placement[Seat]


class Scheduler:
    """Gives rows to those who wait, in their order; nobody overtakes.

    Rows of a capacity are a group, which runs in one batch. Memory is taken when a group grows and given back when
    another one needs it or the group is empty.

    Args:
        capacities: tokens that a row may hold, rising.
        buckets: sizes of a batch, rising; the last one bounds the rows of all groups together.
        budget: of the caches.
        make: makes the rows of a capacity, none at first.
        max_waiting: requests that wait at most.
        spare: asked to give back so many bytes of the budget where it can.
        stays: rows should stay where they are, as captured graphs keep addresses: a group takes as many rows at once as
            there is memory for, and keeps them when it is empty, until another one needs them.

    Attributes:
        waiting: seats without a row, the first one first.
        groups: by capacity.
    """

    def __init__(
        self,
        capacities: Sequence[int],
        buckets: Sequence[int],
        budget: Budget,
        make: Callable[[int], Rows],
        max_waiting: int = 1024,
        spare: Callable[[int], None] = lambda size_bytes: None,
        stays: bool = False,
    ) -> None:
        self._stays = stays
        self._buckets, self._budget, self._spare = tuple(buckets), budget, spare
        self._max_waiting = max_waiting
        self.groups = {capacity: Group(make(capacity), Placement(buckets)) for capacity in sorted(capacities)}
        self.waiting: deque[Seat] = deque()

    @property
    def seated(self) -> int:
        """Requests that have a row."""
        return sum(len(group.placement.rows) for group in self.groups.values())

    def check(self, needed: int, arriving: int = 0) -> None:
        """Make sure that a request can get a row some day, and may wait for it. For any thread.

        Args:
            needed: tokens that it may come to.
            arriving: requests that were checked and are not in the queue yet.

        Raises:
            CacheFullError: `cache full`, and why.
        """
        size = self._buckets[0] * self.groups[self.capacity_for(needed)].cache.row_bytes
        if size > self._budget.most:
            raise CacheFullError(
                f"cache full: {needed} tokens of prompt and answer take {size} bytes of cache, all of it has "
                f"{self._budget.most}; raise {argument('max_cache_bytes')} or lower {argument('max_tokens')}"
            )
        waiting = len(self.waiting) + arriving
        if waiting >= self._max_waiting:
            raise CacheFullError(f"cache full: {waiting} requests wait for a row already; ask again later")

    def capacity_for(self, needed: int) -> int:
        """The smallest capacity that holds so many tokens; the largest one where none does."""
        return next((size for size in self.groups if size >= needed), max(self.groups))

    def add(self, owner: Any, needed: int) -> Seat:
        """A seat in the queue, for a request that was checked."""
        seat = Seat(owner, needed, self.capacity_for(needed))
        self.waiting.append(seat)
        return seat

    def admit(self) -> list[Seat]:
        """Give rows to those who wait, as long as there is room; returns who got one.

        Raises:
            CacheFullError: the budget has room for the first one who waits, but no memory is left, and nobody has a row
                whose memory will be free.
        """
        admitted = []
        while self.waiting and self.seated < self._buckets[-1] and self._seat(self.waiting[0]):
            admitted.append(self.waiting.popleft())
        return admitted

    def leave(self, seat: Seat) -> None:
        """Give up a seat, or a place in the queue."""
        if seat.row is None:
            self.waiting.remove(seat)
            return
        group = self.groups[seat.capacity]
        moves = group.placement.leave(seat.row)
        seat.row = None
        for source, target in moves:
            moved = group.placement.rows[target]
            group.cache.copy_row(source, target, moved.past)
            moved.row = target
        if not group.placement.rows and not self._stays:
            self._resize(group, 0)

    def _seat(self, seat: Seat) -> bool:
        group = self.groups[seat.capacity]
        rows = max(group.placement.size, group.placement.size_after_join or 0)
        if rows > group.cache.rows and not self._grow(group, rows):
            return False
        seat.row = group.placement.join(seat)
        return True

    def _grow(self, group: Group, rows: int) -> bool:
        """Whether a group has so many rows now."""
        if not self._make_room((rows - group.cache.rows) * group.cache.row_bytes, group):
            return False
        for size in self._wanted(group, rows):
            try:
                self._resize(group, size)
                return True
            except MemoryError:
                # What others hold and do not use may be enough.
                self._give_back_all(group)
        if self.seated:
            return False
        raise CacheFullError(
            f"cache full: there is no memory for {rows * group.cache.row_bytes} bytes of cache, though "
            f"{argument('max_cache_bytes')} allows them; lower it, or use a device with more"
        )

    def _wanted(self, group: Group, rows: int) -> list[int]:
        """Numbers of rows to try; `rows` is the last one, and not the only one: something is given back in between."""
        larger = [size for size in reversed(self._buckets) if size > rows] if self._stays else []
        left = self._budget.most // SHARE_LEFT
        fitting = [
            size for size in larger if self._budget.fits((size - group.cache.rows) * group.cache.row_bytes + left)
        ]
        return [*(fitting[:1] or [rows]), rows]

    def _give_back_all(self, asking: Group) -> None:
        """Give back what can be: beginnings of prompts, and rows that other groups do not use."""
        self._spare(self._budget.used)
        for group in self.groups.values():
            if group is not asking and group.cache.rows > group.placement.size:
                self._resize(group, group.placement.size)

    def _make_room(self, size_bytes: int, asking: Group) -> bool:
        """Whether so many bytes are free, after others gave back what they do not use."""
        for group in self.groups.values():
            if self._budget.fits(size_bytes):
                return True
            if group is not asking and group.cache.rows > group.placement.size:
                self._resize(group, group.placement.size)
        lacking = size_bytes - (self._budget.most - self._budget.used)
        if lacking > 0:
            self._spare(lacking)
        return self._budget.fits(size_bytes)

    def _resize(self, group: Group, rows: int) -> None:
        before = group.cache.rows
        group.cache.resize(rows)
        self._budget.take((rows - before) * group.cache.row_bytes)


def in_turn(seats: Iterable[Seat], budget: int, chunk: Callable[[Seat], int]) -> list[Seat]:
    """Whose prompt is read on in one step: the first ones, one chunk each, until the budget of tokens is spent.

    The first one is always among them, or nothing would ever be read.
    """
    chosen: list[Seat] = []
    for seat in seats:
        budget -= chunk(seat)
        if chosen and budget < 0:
            break
        chosen.append(seat)
    return chosen
