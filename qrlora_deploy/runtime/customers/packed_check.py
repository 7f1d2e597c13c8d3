"""Checking a packed file whole without a bundle, as whoever only wants to know what it is does."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qrlora_deploy.errors import FileFormatError
from qrlora_deploy.io.reading import readable
from qrlora_deploy.runtime.customers.packed_header import (
    STORED_DTYPES,
    PackedHeader,
    digest_piece,
    read_exactly,
    read_header,
    tail_pieces,
)
from qrlora_deploy.runtime.customers.packed_tail import PackedTail


def check_packed(path: Path) -> PackedHeader:
    """Read a packed file from its first to its last byte; returns its header.

    It takes the memory of one piece and of the ids.

    Raises:
        InputError: it cannot be read.
        FileFormatError: it is cut, changed, of another format version, or holds NaN, Inf or ids that
            are none.
    """
    with readable(path), path.open("rb", buffering=0) as file:
        tail, _ = check_open(file, path)
    tail.ids()
    tail.thresholds()
    return tail.header


def check_open(file: io.FileIO, path: Path) -> tuple[PackedTail, int]:
    """Read an open packed file as `check_packed` does; what is behind the coefficients, and where those begin."""
    header, expected, start = read_header(file, path)
    digests = []
    for _, piece in pieces(file, header, start, path):
        digests.append(digest_piece(piece.data))
        if not np.isfinite(piece).all():
            raise FileFormatError(f"{path} holds NaN or Inf")
    tail = PackedTail(bytearray(header.tail_bytes), header, path)
    read_exactly(file, start + header.customers * header.row_bytes, memoryview(tail.content), path)
    digests += [digest_piece(piece) for piece in tail_pieces(memoryview(tail.content))]
    if header.seal(digests) != expected:
        raise FileFormatError(f"{path} was changed after it was written: its content digest does not fit")
    return tail, start


def pieces(file: io.FileIO, header: PackedHeader, start: int, path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Coefficients `[n, total_rank]`, piece after piece, with the row that each begins at; all share one memory."""
    shape = (min(header.piece_rows, header.customers), header.total_rank)
    values = np.empty(shape, dtype=STORED_DTYPES[header.stored])
    for first in range(0, header.customers, header.piece_rows):
        piece = values[: min(header.piece_rows, header.customers - first)]
        read_exactly(file, start + first * header.row_bytes, piece.data.cast("B"), path)
        yield first, piece
