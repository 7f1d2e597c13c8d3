"""What the rows of all active customers are trained towards."""

from collections.abc import Sequence

import numpy as np


class TargetTable:
    """The targets of customers of any task, by row: one value, or one a label.

    They lie one after another, so that a customer of many labels makes no other's rows longer.

    Args:
        slots: how many customers are active at once.
    """

    def __init__(self, slots: int) -> None:
        self._own: dict[int, np.ndarray] = {}
        self._flat = np.zeros(0)
        self._starts, self._widths = (np.zeros(slots, dtype=np.int64) for _ in range(2))

    def enter(self, slots: Sequence[int], targets: Sequence[Sequence[float] | Sequence[Sequence[float]]]) -> None:
        """Customers begin.

        Args:
            slots: theirs.
            targets: a list a customer, of one target a row, as `Task.encode` gives them.
        """
        for slot, own in zip(slots, targets, strict=True):
            self._own[slot] = np.asarray(own, dtype=np.float64).reshape(len(own), -1)
        start = 0
        for slot, rows in self._own.items():
            self._starts[slot], self._widths[slot] = start, rows.shape[1]
            start += rows.size
        self._flat = np.concatenate([rows.ravel() for rows in self._own.values()])

    def leave(self, slot: int) -> None:
        """A customer's targets are forgotten."""
        del self._own[slot]

    def of(self, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """`[n, width]` fp64, of the widest of these rows; the others have zeros behind their own.

        Args:
            slots: `[n]`, whose row each is.
            rows: `[n]`, the number of the row among its customer's.
        """
        widths = self._widths[slots]
        columns = np.arange(widths.max(initial=1))
        own = columns < widths[:, None]
        places = (self._starts[slots] + rows * widths)[:, None] + columns
        found: np.ndarray = np.where(own, self._flat[np.where(own, places, 0)], 0.0)
        return found
