"""Rows of a table that may be written."""

from collections.abc import Iterator

import numpy as np

from qrlora_deploy.errors import InputError


class TableFullError(InputError):
    """No row is free and none can be had; later there may be one."""

    kind = "not_ready"


class FreeRows:
    """Rows that were given back, and a range of rows that nobody has had yet: of ten million, two numbers.

    Args:
        first: the first row.
        stop: behind the last one.
    """

    def __init__(self, first: int, stop: int) -> None:
        self._back: list[int] = []
        self._fresh = range(first, stop)

    def __len__(self) -> int:
        return len(self._back) + len(self._fresh)

    def __iter__(self) -> Iterator[int]:
        yield from self._back
        yield from self._fresh

    def take(self) -> int:
        """One row, the one that was given back last if there is any.

        Raises:
            IndexError: there is none.
        """
        if self._back:
            return self._back.pop()
        row = self._fresh[0]
        self._fresh = self._fresh[1:]
        return row

    def take_many(self, count: int) -> np.ndarray:
        """The `count` lowest rows `[count]` int64, rising, so that most lie side by side.

        Raises:
            IndexError: there are fewer.
        """
        if count > len(self):
            raise IndexError(f"{count} rows are more than {len(self)}")
        self._back.sort(reverse=True)
        first = max(0, len(self._back) - count)
        gaps = self._back[first:][::-1]
        del self._back[first:]
        fresh = self._fresh[: count - len(gaps)]
        self._fresh = self._fresh[len(fresh) :]
        return np.concatenate([np.array(gaps, dtype=np.int64), np.arange(fresh.start, fresh.stop, dtype=np.int64)])

    def give_back(self, row: int) -> None:
        """A row that nobody reads any more."""
        self._back.append(row)

    def give_back_many(self, rows: np.ndarray) -> None:
        """Rows from `take_many` that were not used after all."""
        # Those that were the first of the range again become that.
        fitting = rows == np.arange(self._fresh.start - len(rows), self._fresh.start)
        kept = len(rows) if fitting.all() else int(fitting[::-1].argmin())
        self._fresh = range(self._fresh.start - kept, self._fresh.stop)
        self._back.extend(rows[: len(rows) - kept].tolist())

    def add_range(self, stop: int) -> None:
        """Rows up to `stop` are there now."""
        self._fresh = range(self._fresh.start, stop)
