"""Who reads which row of the table, and what goes with the version in it.

A row that its customer gave up is free at once, or when the last run that holds it lets go.
"""

from collections.abc import Iterable
from typing import Any

from qrlora_deploy.runtime.table.free_rows import FreeRows


class RowUse:
    """Counts runs by row. Not safe by itself: every call is made under the table's lock.

    Args:
        free: gets the rows that nobody has any more.

    Attributes:
        holders: runs by row; rows that no run holds are not in it.
        retired: rows without a customer that some run still holds.
    """

    def __init__(self, free: FreeRows) -> None:
        self.holders: dict[int, int] = {}
        self.retired: set[int] = set()
        self._notes: dict[int, Any] = {}
        self._free = free

    def hold(self, row: int) -> None:
        """One more run reads the row."""
        self.holders[row] = self.holders.get(row, 0) + 1

    def release(self, rows: Iterable[int]) -> None:
        """Runs let go of rows, once for every time that they were held."""
        for row in rows:
            self.holders[row] -= 1
            if self.holders[row] == 0:
                del self.holders[row]
                if row in self.retired:
                    self.retired.remove(row)
                    self._set_free(row)

    def retire(self, rows: Iterable[int]) -> None:
        """Rows that no customer has any more: free, or else when the last run lets go."""
        for row in rows:
            if row in self.holders:
                self.retired.add(row)
            else:
                self._set_free(row)

    def note(self, rows: Iterable[int], note: Any) -> None:
        """What goes with the versions in rows from now on."""
        self._notes.update(dict.fromkeys(rows, note))

    def note_of(self, row: int) -> Any:
        """What goes with the version in a row; None where nothing does."""
        return self._notes.get(row)

    def forget(self, row: int) -> None:
        """The version in the row has gone, and the row has another customer."""
        self._notes.pop(row, None)

    def _set_free(self, row: int) -> None:
        self.forget(row)
        self._free.give_back(row)
