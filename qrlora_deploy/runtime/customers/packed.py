"""Very many customers in one file, which fills the table of a switchable session in one go.

A safetensors file with the tensors `coefficients [n, total_rank]` fp32 or fp16, `id_lengths [n]` and
`id_bytes [sum of the lengths]` uint8, and for those k customers who have thresholds `threshold_rows [k]` int64 and
`thresholds [k, labels]` fp64, in this order. Threads read, hash and check its pieces, and
bring them into the form of the table; one after the other they are copied there. The digest in its
metadata covers every byte, and nothing goes live before it was found right.
"""

import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError, MismatchError, argument
from qrlora_deploy.runtime.bundle.bundle import Manifest
from qrlora_deploy.runtime.bundle.row_layout import HEAD_TABLE, TABLE, TableLayout
from qrlora_deploy.runtime.customers.packed_header import (
    STORED_DTYPES,
    PackedHeader,
    digest_piece,
    facts_of,
    metadata_of,
    read_exactly,
    read_header,
    tail_pieces,
)
from qrlora_deploy.runtime.customers.packed_tail import PackedTail
from qrlora_deploy.runtime.sessions.loaded_customers import LoadedCustomers
from qrlora_deploy.runtime.sessions.versions import Version
from qrlora_deploy.tasks.answering import Answering

MOST_THREADS = 8
"""Reading, hashing and checking: so many keep up with what one thread can copy to a GPU."""

SPARE_PIECES = 2
"""Pieces that are ready while the others are being made."""

HALF_EXPONENT = 0x7C00
"""The exponent's bits of an fp16 number; all of them are set in NaN and Inf alone."""

Progress = Callable[[str, int, int], None]


def load_packed(session: LoadedCustomers, path: str | os.PathLike[str], progress: Progress | None = None) -> int:
    """Make every customer of a packed file live in `session`; those that are loaded already change.

    Either all of them go live or, on any error, none. Load it before a `CustomerStore` starts: the
    files of the store's folder then win over the packed ones. Coefficients are rounded once where
    the table is fp16 and the file is not.

    Args:
        session: a session on the bundle for which the file was packed.
        path: the file.
        progress: called with (description, done, total) of customers.

    Returns:
        The number of customers.

    Raises:
        FileFormatError: the file is cut, changed, of another format version, or holds NaN or Inf.
        InputError: it cannot be read, belongs to another bundle, holds numbers that the table cannot,
            or has more customers than the table may hold.
        QrloraError: the table cannot grow.
    """
    path = Path(path)
    try:
        # Before it is opened: a pipe would keep the reader waiting for ever.
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no plain file")
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1, thread_name_prefix="packed-ids") as ids:
            header, expected, start = read_header(file, path)
            _check_bundle(header, path, session.manifest)
            source = _Source(file, path, header, start)
            tail = PackedTail(bytearray(header.tail_bytes), header, path)
            source.read(start + header.customers * header.row_bytes, memoryview(tail.content))
            # A second or two for ten million, beside the reading of their coefficients.
            index = ids.submit(tail.ids)
            blocks = _blocks(session, source, tail.content, expected, progress)
            labels = session.manifest.labels

            def notes() -> dict[int, Version | None]:
                found = tail.thresholds().items()
                return {row: session.versions.without_digest(Answering(labels, values)) for row, values in found}

            session.table.publish_bulk(header.customers, blocks, index.result, notes=notes)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return header.customers


def _check_bundle(header: PackedHeader, path: Path, manifest: Manifest) -> None:
    expected, stored = metadata_of(manifest), facts_of(header, path)
    for name in ("basis_digest", "base_digest"):
        if stored.get(name) != expected[name]:
            found = str(stored.get(name))[:12]
            raise BasisMismatchError(
                f"{path} was packed for {name} {found}, but the bundle holds {expected[name][:12]}"
            )
    if stored != expected or header.total_rank != manifest.total_rank:
        raise MismatchError(f"{path} has another task, other labels or another number of coefficients than the bundle")


@dataclass(frozen=True)
class _Source:
    """An open packed file, whose coefficients begin at `start`."""

    file: io.FileIO
    path: Path
    header: PackedHeader
    start: int

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            FileFormatError: the file ends before.
        """
        read_exactly(self.file, offset, view, self.path)


class _Piece:
    """Memory for a piece of the file: as it is stored, and as the table wants it."""

    def __init__(self, header: PackedHeader, layout: TableLayout, staged: np.ndarray) -> None:
        self.header, self.layout, self.staged = header, layout, staged
        stored, shape = STORED_DTYPES[header.stored], (len(staged), header.total_rank)
        # Where nothing has to be converted, the file is read to where it is copied from.
        self.raw = staged if (staged.dtype, staged.shape) == (stored, shape) else np.empty(shape, dtype=stored)
        self.count = 0

    def fill(self, source: _Source, number: int) -> bytes:
        """Read a piece, check it and bring it into the form of the table; returns its digest.

        Raises:
            FileFormatError: the file is cut, or holds NaN or Inf.
            InputError: fp16 cannot hold it.
        """
        first = number * len(self.raw)
        self.count = min(len(self.raw), self.header.customers - first)
        values = self.raw[: self.count]
        source.read(source.start + first * self.header.row_bytes, values.data.cast("B"))
        digest = digest_piece(values.data)
        if not _all_finite(values):
            raise FileFormatError(f"{source.path} holds NaN or Inf")
        if self.raw is not self.staged:
            with np.errstate(over="ignore"):
                _spread(values, self.staged[: self.count], self.layout)
            if self.staged.dtype == np.float16 and not _all_finite(self.staged[: self.count]):
                raise InputError(
                    f"{source.path} holds a coefficient of {np.abs(values).max():.4g}, more than the fp16 table can; "
                    f"serve it from a bundle exported with {argument('table_dtype', 'fp32')}"
                )
        return digest


def _blocks(
    session: LoadedCustomers, source: _Source, tail: bytearray, expected: str, progress: Progress | None
) -> Iterator[dict[str, np.ndarray]]:
    """Rows of the table, block after block; the last step compares the digest."""
    header, path = source.header, source.path
    pieces = -(-header.customers // header.piece_rows)
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    rows = min(header.piece_rows, header.customers)
    staging = session.table.memory.parts[TABLE].staging
    memory = [_Piece(header, session.layout, staging(rows)) for _ in range(min(threads + SPARE_PIECES, pieces))]
    digests: list[bytes] = []
    done = 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="packed-pieces")
    try:
        under_way: deque[tuple[_Piece, Future[bytes]]] = deque(
            (piece, pool.submit(piece.fill, source, number)) for number, piece in enumerate(memory)
        )
        for number in range(len(memory), pieces + len(memory)):
            piece, filled = under_way.popleft()
            digests.append(filled.result())
            done += piece.count
            yield _block(session, piece)
            if progress is not None:
                progress("loading", done, header.customers)
            if number < pieces:
                under_way.append((piece, pool.submit(piece.fill, source, number)))
        digests += pool.map(digest_piece, tail_pieces(memoryview(tail)))
    finally:
        pool.shutdown(cancel_futures=True)
    if header.seal(digests) != expected:
        raise FileFormatError(f"{path} was changed after it was written: its content digest does not fit")


def _block(session: LoadedCustomers, piece: _Piece) -> dict[str, np.ndarray]:
    block = {TABLE: piece.staged[: piece.count]}
    if session.base_head is not None:
        block[HEAD_TABLE] = np.broadcast_to(session.base_head, (piece.count, len(session.base_head)))
    return block


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == np.float16:
        # numpy looks at fp16 numbers one by one; at whole numbers it looks several at a time.
        return int((values.view(np.uint16) & HALF_EXPONENT).max()) < HALF_EXPONENT
    return bool(np.isfinite(values).all())


def _spread(values: np.ndarray, rows: np.ndarray, layout: TableLayout) -> None:
    """`values [n, total_rank]` to `rows [n, width]`, whose padding is zero already."""
    source = place = 0
    for rank, padded in zip(layout.ranks, layout.padded_ranks, strict=True):
        rows[:, place : place + rank] = values[:, source : source + rank]
        source, place = source + rank, place + padded
