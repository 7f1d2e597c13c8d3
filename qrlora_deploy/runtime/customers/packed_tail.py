"""What follows the coefficients in a packed file: ids, and the thresholds of customers who have some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.runtime.customers.packed_header import PackedHeader
from qrlora_deploy.runtime.table.id_index import IdIndex
from qrlora_deploy.tasks.thresholds import check_thresholds

ROWS, VALUES = np.dtype("<i8"), np.dtype("<f8")


@dataclass(frozen=True)
class PackedTail:
    """The bytes behind the coefficients, whose digest need not have been compared yet.

    Attributes:
        content: all of them.
        header: of the file.
        path: the file, for messages.
    """

    content: bytearray
    header: PackedHeader
    path: Path

    def ids(self) -> IdIndex:
        """The ids, from their lengths and their text.

        Raises:
            FileFormatError: there are others, or none.
        """
        view, count = memoryview(self.content), self.header.customers
        text = bytes(view[count : count + self.header.id_bytes])
        try:
            return IdIndex(np.frombuffer(self.content, dtype=np.uint8, count=count), text)
        except InputError as error:
            raise FileFormatError(f"{self.path}: {error}") from error

    def thresholds(self) -> dict[int, tuple[float, ...]]:
        """Thresholds by the customer's row, of those who have some.

        Raises:
            FileFormatError: a row is not there or occurs twice, or numbers are no thresholds.
        """
        header, count = self.header, self.header.tuned
        start = header.customers + header.id_bytes
        rows = np.frombuffer(self.content, ROWS, count, start)
        labels = len(header.labels)
        values = np.frombuffer(self.content, VALUES, count * labels, start + rows.nbytes).reshape(count, labels)
        if count and (rows[0] < 0 or rows[-1] >= header.customers or not (np.diff(rows) > 0).all()):
            raise FileFormatError(f"{self.path}: it has thresholds of customers that are not there")
        try:
            check_thresholds(values.ravel().tolist(), values.size)
        except ValueError as error:
            raise FileFormatError(f"{self.path}: {error}") from error
        return {row: tuple(own) for row, own in zip(rows.tolist(), values.tolist(), strict=True)}


def threshold_bytes(thresholds: Mapping[int, Sequence[float]]) -> bytes:
    """The end of a packed file, from thresholds by the customer's row, rising."""
    rows = np.array(list(thresholds), dtype=ROWS)
    return rows.tobytes() + np.array(list(thresholds.values()), dtype=VALUES).tobytes()
