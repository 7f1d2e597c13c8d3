"""The coefficient table: which customer has which row, and when a row may be written again.

A new version of a customer goes to a row that nobody reads; then the customer's row number flips,
and the old row is free once the last run that holds it is done. So no run sees half of a swap, a
writer never waits for a run, and a run waits for nothing but a few look-ups.

Customers that are published together, by the million, are found through an index of some 35 bytes
each; one that is published by itself afterwards gets an entry in a dictionary.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.host.forking import survive_forks
from qrlora_deploy.runtime.table.blocks import Block, write_blocks
from qrlora_deploy.runtime.table.directory import Bulk, Directory
from qrlora_deploy.runtime.table.free_rows import FreeRows, TableFullError
from qrlora_deploy.runtime.table.id_index import IdIndex
from qrlora_deploy.runtime.table.memory import TableMemory
from qrlora_deploy.runtime.table.row_use import RowUse

BASE_ROW = 0
"""Zeros: the base model."""

MOST_ROWS = 2**31 - 1
"""As many as a bulk has customers; more have no size that the libraries beneath can count."""


class CoefficientTable:
    """Rows by customer, in a memory that doubles when it is full.

    Args:
        make: makes the memory for a number of rows.
        rows: rows at the start, with the base's.
        max_rows: rows at most; then a customer of a bulk that was never used gives way, or the one
            that was not used for longest. None: no bound.

    Attributes:
        loads: versions of customers that were published since the start.
        evictions: customers that made room for others.

    Raises:
        InputError: the numbers of rows make no sense.
        QrloraError: the memory does not fit the device.
    """

    def __init__(self, make: Callable[[int], TableMemory], rows: int = 64, max_rows: int | None = None) -> None:
        if rows < 2 or (max_rows is not None and max_rows < rows):
            raise InputError(f"a table needs at least 2 rows and no more than its bound, not {rows} of {max_rows}")
        if rows > MOST_ROWS:
            raise InputError(f"a table has {MOST_ROWS} rows at most, not {rows}")
        self.memory = make(rows)
        self.max_rows = max_rows
        self.loads = self.evictions = 0
        # Short: look-ups and counts only. Never held while memory is copied.
        self._lock = threading.Lock()
        # One writer at a time, so that a row is not lost while the memory grows.
        self._writing = threading.Lock()
        # While a bulk takes the place of what is older.
        self._flipping = threading.Lock()
        self._directory = Directory()
        self._free = FreeRows(BASE_ROW + 1, rows)
        self._use = RowUse(self._free)
        survive_forks(self)

    def before_fork(self) -> None:
        """A forked child finds no half of a swap."""
        self._writing.acquire()
        self._lock.acquire()

    def after_fork(self, in_child: bool) -> None:
        """The locks are free again, in the child too."""
        self._lock.release()
        self._writing.release()
        if in_child:
            self._flipping = threading.Lock()

    def __len__(self) -> int:
        return len(self._directory)

    def __contains__(self, customer: str) -> bool:
        with self._lock:
            return self._directory.find(customer) is not None

    def customers(self) -> list[str]:
        """Names of the customers that have a row: a new text for each. Runs go on meanwhile."""
        with self._flipping, self._lock:
            # Runs wait for a look in here, not for millions of names.
            names = self._directory.names()
        return list(names)

    @property
    def index_bytes(self) -> int:
        """Memory of the host by which the customers of bulks are found."""
        return sum(bulk.size_bytes for bulk in self._directory.bulks)

    def holds(self, customer: str, values: dict[str, np.ndarray], note: Any = None) -> bool:
        """Whether `customer` has a row with exactly the bytes of `values`, and this note. It does not count as use."""
        with self._lock:
            row = self._directory.find(customer)
            if row is None or self._use.note_of(row) != note:
                return False
            self._use.hold(row)
            memory = self.memory
        try:
            return memory.holds(row, values)
        finally:
            self.release([row])

    def publish(self, customer: str, values: dict[str, np.ndarray], note: Any = None) -> None:
        """Make `values`, a row `[width]` per input, what `customer` is from now on.

        Runs that began before go on with the old version; runs that begin afterwards see the new one,
        and wait for it where it is still on its way to the device.
        `note` goes with the version: `note_of` a held row gives it back.

        Raises:
            TableFullError: the table is full and every customer in it is in use.
            QrloraError: the table cannot grow.
        """
        with self._writing:
            row = self._take_row()
            try:
                self.memory.write(row, values)
            except BaseException:
                with self._lock:
                    self._free.give_back(row)
                raise
            with self._lock:
                if note is not None:
                    self._use.note([row], note)
                self._use.retire(self._directory.put(customer, row))
                self.loads += 1

    def publish_bulk(
        self,
        count: int,
        blocks: Iterable[dict[str, np.ndarray]],
        index: Callable[[], IdIndex],
        note: Any = None,
        notes: Callable[[], Mapping[int, Any]] = dict,
    ) -> None:
        """Publish many customers at once: the table grows once, and blocks of rows are copied whole.

        No customer changes before the last block is there; an error of `blocks` or `index` changes
        nothing. Nobody is pushed out of a full table. A customer that is published by itself
        meanwhile may end with either version.

        Args:
            count: how many.
            blocks: rows `[n, width]` per input; together `count`. A block is done with when the next
                one is asked for.
            index: gives their names, in the order of the rows; called after the last block.
            note: goes with every one of these versions.
            notes: gives what goes with some of them instead, by the number of their row; called after `index`.

        Raises:
            InputError: there are more or fewer rows or names than `count`.
            TableFullError: the bound of the table leaves too few rows.
            QrloraError: the table cannot grow.
        """
        rows = self._take_rows(count)
        try:
            write_blocks(rows, blocks, self._write_parts)
            found = index()
            if len(found) != count:
                raise InputError(f"there are {len(found)} names for {count} customers")
            bulk, own = Bulk(found, rows), notes()
        except BaseException:
            with self._lock:
                self._free.give_back_many(rows)
            raise
        with self._flipping:
            with self._lock:
                if note is not None:
                    self._use.note(rows.tolist(), note)
                for number, special in own.items():
                    self._use.note([int(rows[number])], special)
                older, names = self._directory.add(bulk), self._directory.entries()
                self.loads += count
            self._supersede(bulk, older, names)

    def remove(self, customer: str) -> bool:
        """Take a customer out; runs that hold it are not disturbed. False where there is none."""
        with self._lock:
            rows = self._directory.take_out(customer)
            self._use.retire(rows)
        return bool(rows)

    def hold(self, customers: Iterable[str | None]) -> tuple[dict[str | None, int], list[str]]:
        """Hold the rows of `customers` until `release`; None is the base.

        Returns:
            The row of each that is there, and the names of those that are not.

        Raises:
            QrloraError: the device refused to take a row.
        """
        held: dict[str | None, int] = {}
        missing = []
        with self._lock:
            for customer in dict.fromkeys(customers):
                row = BASE_ROW if customer is None else self._directory.find(customer)
                if row is None:
                    missing.append(str(customer))
                    continue
                held[customer] = row
                if customer is not None:
                    self._use.hold(row)
                    if self.max_rows is not None:
                        self._use.retire(self._directory.use(customer))
        try:
            # The rows that were found are written, but may still be on their way to the device.
            self.memory.settle()
        except BaseException:
            self.release(held.values())
            raise
        return held, missing

    def release(self, rows: Iterable[int]) -> None:
        """Give back rows from `hold`, once for every time they were held."""
        with self._lock:
            self._use.release(row for row in rows if row != BASE_ROW)

    def note_of(self, row: int) -> Any:
        """What was published with the version in a row that is held; None for the base."""
        return self._use.note_of(row)

    def note(self, row: int, note: Any) -> None:
        """Let something else go with the version in a row that is held."""
        with self._lock:
            self._use.note([row], note)

    def _supersede(self, bulk: Bulk, older: Sequence[Bulk], names: Sequence[str]) -> None:
        """Take the customers of a new bulk out of everything older, in steps that keep no run waiting."""
        for step in self._directory.supersede(bulk, older, names):
            with self._lock:
                self._use.retire(step())

    def _take_row(self) -> int:
        """A row that nobody reads. Called by the one writer."""
        with self._lock:
            if self._free:
                return self._free.take()
            rows = self.memory.rows
            if self.max_rows is not None and rows >= self.max_rows:
                return self._evict()
        self._grow(min(2 * rows, self.max_rows or 2 * rows))
        with self._lock:
            return self._free.take()

    def _take_rows(self, count: int) -> np.ndarray:
        """`count` rows `[count]` int64 that nobody reads, rising, so that most lie side by side."""
        with self._writing:
            with self._lock:
                lacking = count - len(self._free)
            rows = self.memory.rows
            if self.max_rows is not None and rows + lacking > self.max_rows:
                raise TableFullError(
                    f"{count} customers need as many free rows, but the table has no more than {self.max_rows}, "
                    f"{len(self)} of them in use; open it with more rows"
                )
            if lacking > 0:
                # Some more, so that the next new customer does not double so large a table.
                spare = rows + lacking + max(64, (rows + lacking) // 16)
                self._grow(min(spare, self.max_rows or spare))
            with self._lock:
                return self._free.take_many(count)

    def _grow(self, rows: int) -> None:
        """Called by the one writer."""
        larger = self.memory.grown(rows)
        with self._lock:
            # A run that holds the old memory keeps it alive; all rows are the same in both.
            self.memory = larger
            self._free.add_range(rows)

    def _write_parts(self, parts: list[tuple[int, Block]]) -> None:
        # Per block, so that other writers wait for little. The memory may have grown since: it has what was written.
        with self._writing:
            for first, part in parts:
                self.memory.write_rows(first, part)

    def _evict(self) -> int:
        row = self._directory.give_way(self._use.holders)
        if row is not None:
            self._use.forget(row)
            self.evictions += 1
            return row
        raise TableFullError(f"all {self.max_rows} rows of the table are in use; open it with more rows")


def rows_of(customers: Sequence[str | None], held: dict[str | None, int]) -> np.ndarray:
    """The `slot [batch]` int64 of a batch."""
    return np.array([held[customer] for customer in customers], dtype=np.int64)
