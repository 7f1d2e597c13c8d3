"""Taking a customer out of a packed file."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.io.reading import readable
from qrlora_deploy.runtime.customers.packed_check import check_open, pieces
from qrlora_deploy.runtime.customers.packed_header import PackedHeader, facts_of
from qrlora_deploy.runtime.customers.packed_tail import PackedTail
from qrlora_deploy.runtime.customers.packed_writer import write_blocks_under
from qrlora_deploy.runtime.table.id_index import IdIndex


def erase_packed(path: Path, customer: str) -> bool:
    """Write a packed file anew without a customer, in one step; everybody else stays bit for bit.

    The file is read and checked whole, and written whole: that takes as long as packing it, and room for two.

    Returns:
        Whether the customer was in it.

    Raises:
        FileFormatError: the file is damaged.
        InputError: it cannot be read, or holds nobody else.
        QrloraError: the disk is full.
    """
    with readable(path), path.open("rb", buffering=0) as file:
        tail, start = check_open(file, path)
        index = tail.ids()
        row = index.find(customer)
        if row is None:
            return False
        if tail.header.customers == 1:
            raise InputError(f"{path} holds nobody but {customer}; remove the file")
        old = tail.header
        header = PackedHeader(facts_of(old, path), 0, old.total_rank, 0, old.stored)
        write_blocks_under(header, _others(file, tail, start, index, row), path, _others_thresholds(tail, row))
    return True


def _others(
    file: io.FileIO, tail: PackedTail, start: int, index: IdIndex, row: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and coefficients of everybody but one, piece after piece."""
    for first, values in pieces(file, tail.header, start, tail.path):
        kept = [number for number in range(len(values)) if first + number != row]
        if kept:
            yield [index.name(first + number) for number in kept], values[kept]


def _others_thresholds(tail: PackedTail, row: int) -> dict[int, tuple[float, ...]]:
    """Thresholds by the row that customers have without one."""
    return {number - (number > row): own for number, own in tail.thresholds().items() if number != row}
