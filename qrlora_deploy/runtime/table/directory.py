"""Which customer has which row of a table: an entry for each, or an index for all that were published together."""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np

from qrlora_deploy.runtime.table.id_index import CHUNK, IdIndex

RECENT = 2**16
"""Customers of bulks whose rows are kept at hand: a dictionary answers ten times as fast as an index."""

FLIP_CUSTOMERS = 2048
"""Customers whose row numbers change under one hold of the lock: a bulk does not keep runs waiting."""

GONE = -1
"""The row of a customer that has another one by now, or none."""


class Bulk:
    """Who has which row, until they are published one by one. For one thread at a time.

    Args:
        index: the customers.
        rows: `[n]` int64, their rows by place.

    Attributes:
        live: how many still have their row.
    """

    def __init__(self, index: IdIndex, rows: np.ndarray) -> None:
        self.index = index
        self.live = len(index)
        self._rows = rows.astype(np.int32)
        # Single numbers are read and written through this: numpy takes several times as long.
        self._view = self._rows.data
        self._looked_at = 0

    @property
    def size_bytes(self) -> int:
        """Memory on the host."""
        return self.index.size_bytes + self._rows.nbytes

    def row_of(self, customer: str) -> int | None:
        """The row of a customer, or None."""
        place = self.index.find(customer)
        if place is None:
            return None
        row = self._view[place]
        return None if row == GONE else row

    def take_out(self, customer: str) -> int | None:
        """Forget a customer; returns the row it had, or None."""
        place = self.index.find(customer)
        return None if place is None else self._take_out_at(place)

    def take_out_many(self, places: np.ndarray) -> list[int]:
        """Forget the customers at `places`; returns the rows they had."""
        rows = [self._take_out_at(place) for place in places.tolist()]
        return [row for row in rows if row is not None]

    def take_out_first(self) -> int | None:
        """Forget the first customer that has its row; returns the row, or None where nobody has."""
        while self._looked_at < len(self._view):
            row = self._take_out_at(self._looked_at)
            if row is not None:
                return row
            self._looked_at += 1
        return None

    def names(self) -> Iterator[str]:
        """Names of those that have their row now; they are listed later, and whatever happens meanwhile."""
        return _names_at(self.index, self._rows != GONE)

    def _take_out_at(self, place: int) -> int | None:
        row = self._view[place]
        if row == GONE:
            return None
        self._view[place] = GONE
        self.live -= 1
        return row


class Directory:
    """Customers and their rows. For one thread at a time.

    Who was published by himself has an entry in a dictionary, whatever a bulk says of him; a later
    bulk comes before an earlier one.
    """

    def __init__(self) -> None:
        self._row_of: OrderedDict[str, int] = OrderedDict()
        self._recent: dict[str, int] = {}
        self.bulks: tuple[Bulk, ...] = ()

    def __len__(self) -> int:
        return len(self._row_of) + sum(bulk.live for bulk in self.bulks)

    def names(self) -> Iterator[str]:
        """All names as they are now; they are listed later, and whatever happens meanwhile.

        Some come twice while a bulk takes the place of older entries.
        """
        return chain(self.entries(), *[bulk.names() for bulk in self.bulks])

    def entries(self) -> list[str]:
        """Names of those with an entry of their own."""
        # A fifth of the time that the ordered dictionary's own iterator takes.
        return list(dict.keys(self._row_of))

    def find(self, customer: str) -> int | None:
        """The row of a customer, or None."""
        row = self._row_of.get(customer)
        if row is None and self.bulks:
            row = self._recent.get(customer)
            if row is None:
                row = self._find_in_bulks(customer)
        return row

    def put(self, customer: str, row: int) -> list[int]:
        """Give a customer an entry; returns the rows it had."""
        old = self._row_of.pop(customer, None)
        self._row_of[customer] = row
        if old is not None:
            # Nobody has both an entry and a row of a bulk, but while a bulk takes the place of entries.
            return [old]
        return self._out_of_bulks(customer) if self.bulks else []

    def take_out(self, customer: str) -> list[int]:
        """Forget a customer; returns the rows it had."""
        row = self._row_of.pop(customer, None)
        return self._out_of_bulks(customer) + ([] if row is None else [row])

    def use(self, customer: str) -> list[int]:
        """Make a customer the last to give way; returns rows that are of no use any more."""
        if customer in self._row_of:
            self._row_of.move_to_end(customer)
            return []
        row, *others = self._out_of_bulks(customer)
        self._row_of[customer] = row
        return others

    def give_way(self, held: Container[int]) -> int | None:
        """Forget somebody of a bulk that was never used, or else who was not used for longest and is not held.

        Returns:
            The row, or None where all are held.
        """
        for bulk in reversed(self.bulks):
            row = bulk.take_out_first()
            if row is not None:
                # Whose it was is not known. Nobody has used it, but somebody may have asked for it.
                self._recent.clear()
                return row
        for customer, row in self._row_of.items():
            if row not in held:
                del self._row_of[customer]
                return row
        return None

    def add(self, bulk: Bulk) -> tuple[Bulk, ...]:
        """Put a bulk before the others, and return those."""
        older = self.bulks
        self.bulks = (bulk, *older)
        self._recent.clear()
        return older

    def supersede(self, bulk: Bulk, older: Sequence[Bulk], names: Sequence[str]) -> Iterator[Callable[[], list[int]]]:
        """Steps that take the customers of a new bulk out of everything older, for other threads to come in between.

        Args:
            bulk: after `add`, which returned `older`.
            older: the bulks before it.
            names: of those with an entry of their own.

        Returns:
            Short steps; each returns the rows that nobody has any more.
        """
        for first in range(0, len(names), FLIP_CUSTOMERS):
            yield partial(self._give_up_entries, names[first : first + FLIP_CUSTOMERS], bulk)
        for other in older:
            places = np.flatnonzero(other.index.places_in(bulk.index) >= 0)
            for first in range(0, len(places), FLIP_CUSTOMERS):
                yield partial(other.take_out_many, places[first : first + FLIP_CUSTOMERS])
        yield self._drop_empty

    def _give_up_entries(self, names: Sequence[str], bulk: Bulk) -> list[int]:
        return [self._row_of.pop(name) for name in names if name in self._row_of and bulk.row_of(name) is not None]

    def _drop_empty(self) -> list[int]:
        self.bulks = tuple(bulk for bulk in self.bulks if bulk.live)
        return []

    def _find_in_bulks(self, customer: str) -> int | None:
        for bulk in self.bulks:
            row = bulk.row_of(customer)
            if row is not None:
                if len(self._recent) >= RECENT:
                    self._recent.clear()
                self._recent[customer] = row
                return row
        return None

    def _out_of_bulks(self, customer: str) -> list[int]:
        self._recent.pop(customer, None)
        rows = [bulk.take_out(customer) for bulk in self.bulks]
        return [row for row in rows if row is not None]


def _names_at(index: IdIndex, there: np.ndarray) -> Iterator[str]:
    for start in range(0, len(there), CHUNK):
        for place in np.flatnonzero(there[start : start + CHUNK]).tolist():
            yield index.name(start + place)
