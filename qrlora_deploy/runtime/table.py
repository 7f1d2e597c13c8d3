"""The coefficient table: which customer has which row, and when a row may be written again.

A new version of a customer goes to a row that nobody reads; then the customer's row number flips,
and the old row is free once the last run that holds it is done. So no run sees half of a swap, a
writer never waits for a run, and a run waits for nothing but a few dictionary look-ups.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.memory import TableMemory

BASE_ROW = 0
"""Zeros: the base model."""

FLIP_CUSTOMERS = 2048
"""Customers whose row numbers change under one hold of the lock: a bulk does not keep runs waiting."""


class TableFullError(InputError):
    """No row is free and none can be had; later there may be one."""


class CoefficientTable:
    """Rows by customer, in a memory that doubles when it is full.

    Args:
        make: makes the memory for a number of rows.
        rows: rows at the start, with the base's.
        max_rows: rows at most; then the customer that was not used for longest gives way. None:
            no bound.

    Raises:
        InputError: the numbers of rows make no sense.
        QrloraError: the memory does not fit the device.
    """

    def __init__(self, make: Callable[[int], TableMemory], rows: int = 64, max_rows: int | None = None) -> None:
        if rows < 2 or (max_rows is not None and max_rows < rows):
            raise InputError(f"a table needs at least 2 rows and no more than its bound, not {rows} of {max_rows}")
        self.memory = make(rows)
        self.max_rows = max_rows
        # Short: look-ups and counts only. Never held while memory is copied.
        self._lock = threading.Lock()
        # One writer at a time, so that a row is not lost while the memory grows.
        self._writing = threading.Lock()
        self._row_of: OrderedDict[str, int] = OrderedDict()
        self._holders: dict[int, int] = {}
        self._retired: set[int] = set()
        self._notes: dict[int, Any] = {}
        self._free = list(range(rows - 1, BASE_ROW, -1))

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, customer: str) -> bool:
        return customer in self._row_of

    def customers(self) -> list[str]:
        """Names of the customers that have a row."""
        with self._lock:
            return list(self._row_of)

    def publish(self, customer: str, values: dict[str, np.ndarray], note: Any = None) -> None:
        """Make `values`, a row `[width]` fp32 per input, what `customer` is from now on.

        Runs that began before go on with the old version; runs that begin afterwards see the new one.
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
                    self._free.append(row)
                raise
            with self._lock:
                self._flip(customer, row, note)

    def publish_many(self, customers: Sequence[str], blocks: Iterable[dict[str, np.ndarray]], note: Any = None) -> None:
        """Publish many customers at once: the table grows once, and blocks of rows are copied whole.

        No customer changes before the last block is there; an error of `blocks` changes nothing.
        Then each customer flips as in `publish`. Nobody is pushed out of a full table.

        Args:
            customers: the names, each once.
            blocks: rows `[n, width]` fp32 per input, in the order of `customers`; together as many.
            note: goes with every one of these versions.

        Raises:
            InputError: a name occurs twice, or there are more or fewer rows than names.
            TableFullError: the bound of the table leaves too few rows.
            QrloraError: the table cannot grow.
        """
        if len(set(customers)) != len(customers):
            raise InputError("a customer occurs twice")
        rows = self._take_rows(len(customers))
        flipped = 0
        try:
            self._write_blocks(rows, blocks)
            numbers = rows.tolist()
            for first in range(0, len(numbers), FLIP_CUSTOMERS):
                with self._lock:
                    for index in range(first, min(first + FLIP_CUSTOMERS, len(numbers))):
                        # Counted first: a row that is lost does no harm, one that is free twice does.
                        flipped = index + 1
                        self._flip(customers[index], numbers[index], note)
        finally:
            with self._lock:
                self._free.extend(rows[flipped:].tolist())

    def remove(self, customer: str) -> bool:
        """Take a customer out; runs that hold it are not disturbed. False where there is none."""
        with self._lock:
            row = self._row_of.pop(customer, None)
            if row is not None:
                self._retire(row)
        return row is not None

    def hold(self, customers: Iterable[str | None]) -> tuple[dict[str | None, int], list[str]]:
        """Hold the rows of `customers` until `release`; None is the base.

        Returns:
            The row of each that is there, and the names of those that are not.
        """
        held: dict[str | None, int] = {}
        missing = []
        with self._lock:
            for customer in dict.fromkeys(customers):
                row = BASE_ROW if customer is None else self._row_of.get(customer)
                if row is None:
                    missing.append(str(customer))
                    continue
                held[customer] = row
                if customer is not None:
                    self._holders[row] = self._holders.get(row, 0) + 1
                    self._row_of.move_to_end(customer)
        return held, missing

    def release(self, rows: Iterable[int]) -> None:
        """Give back rows from `hold`, once for every time they were held."""
        with self._lock:
            for row in rows:
                if row == BASE_ROW:
                    continue
                self._holders[row] -= 1
                if self._holders[row] == 0:
                    del self._holders[row]
                    if row in self._retired:
                        self._retired.remove(row)
                        self._free.append(row)

    def note_of(self, row: int) -> Any:
        """What was published with the version in a row that is held; None for the base."""
        return self._notes.get(row)

    def _flip(self, customer: str, row: int, note: Any) -> None:
        """Make a row that is written the customer's. Called under the lock."""
        if note is None:
            self._notes.pop(row, None)
        else:
            self._notes[row] = note
        old = self._row_of.pop(customer, None)
        self._row_of[customer] = row
        if old is not None:
            self._retire(old)

    def _retire(self, row: int) -> None:
        if row in self._holders:
            self._retired.add(row)
        else:
            self._free.append(row)

    def _take_row(self) -> int:
        """A row that nobody reads. Called by the one writer."""
        with self._lock:
            if self._free:
                return self._free.pop()
            rows = self.memory.rows
            if self.max_rows is not None and rows >= self.max_rows:
                return self._evict()
        self._grow(min(2 * rows, self.max_rows or 2 * rows))
        with self._lock:
            return self._free.pop()

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
                self._free.sort(reverse=True)
                first = len(self._free) - count
                taken = self._free[first:]
                del self._free[first:]
        return np.array(taken[::-1], dtype=np.int64)

    def _grow(self, rows: int) -> None:
        """Called by the one writer."""
        old = self.memory.rows
        larger = self.memory.grown(rows)
        with self._lock:
            # A run that holds the old memory keeps it alive; all rows are the same in both.
            self.memory = larger
            self._free.extend(range(rows - 1, old - 1, -1))

    def _write_blocks(self, rows: np.ndarray, blocks: Iterable[dict[str, np.ndarray]]) -> None:
        done = 0
        for block in blocks:
            count = len(next(iter(block.values())))
            if any(len(values) != count for values in block.values()):
                raise InputError("a block has another number of rows for every input")
            if count == 0:
                continue
            numbers = rows[done : done + count]
            if len(numbers) < count:
                raise InputError(f"there are more rows than the {len(rows)} customers")
            breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
            # Per block, so that other writers wait for a few megabytes only. The memory may have
            # grown since the last one: what was written is in the new one too.
            with self._writing:
                for first, last in zip((0, *breaks), (*breaks, count), strict=True):
                    part = {name: values[first:last] for name, values in block.items()}
                    self.memory.write_rows(int(numbers[first]), part)
            done += count
        if done < len(rows):
            raise InputError(f"there are {done} rows for {len(rows)} customers")

    def _evict(self) -> int:
        for customer, row in self._row_of.items():
            if row not in self._holders:
                del self._row_of[customer]
                return row
        raise TableFullError(f"all {self.max_rows} rows of the table are in use; open it with more rows")


def rows_of(customers: Sequence[str | None], held: dict[str | None, int]) -> np.ndarray:
    """The `slot [batch]` int64 of a batch."""
    return np.array([held[customer] for customer in customers], dtype=np.int64)
