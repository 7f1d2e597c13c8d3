"""Writing a packed file: from files of customers one by one, or from arrays of them block by block."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.formats.customer_files import check_customer_id, customer_ids, read_customer
from qrlora_deploy.io.files import atomic_file
from qrlora_deploy.runtime.bundle.bundle import Manifest
from qrlora_deploy.runtime.bundle.compatibility import check_customer_fits
from qrlora_deploy.runtime.bundle.row_layout import check_half_range
from qrlora_deploy.runtime.customers.packed_header import (
    NO_DIGEST,
    STORED_DTYPES,
    PackedHeader,
    digest_piece,
    metadata_of,
    tail_pieces,
)
from qrlora_deploy.runtime.customers.packed_tail import threshold_bytes
from qrlora_deploy.runtime.table.id_index import IdIndex, encode_ids

Progress = Callable[[str, int, int], None]

STORED = {"fp32": "F32", "fp16": "F16"}

TOGETHER = 256
"""Customers that come one by one and are written as one block."""

THREADS = 4
"""For hashing what is written; the disk or the copying is slower than so many."""


def write_packed(
    source: Path | Iterable[tuple[str, Coefficients]],
    path: Path,
    manifest: Manifest,
    progress: Progress | None = None,
    dtype: str | None = None,
) -> int:
    """Write customers of one switchable bundle into one file, replacing `path` in one step.

    Args:
        source: a folder of `<id>.safetensors`, taken in the order of their ids, or customers by id.
        path: the file to write.
        manifest: the bundle's; every customer must fit it.
        progress: called with (description, done, total); total is 0 where it is not known.
        dtype: of the coefficients in the file, "fp32" or "fp16"; None: that of the bundle's table.

    Returns:
        The number of customers.

    Raises:
        InputError: there is no customer, or one does not fit the bundle, has a head of its own,
            occurs twice or holds a number that fp16 cannot; it is named.
    """
    total, items = _items_of(source)
    thresholds: dict[int, tuple[float, ...]] = {}

    def rows() -> Iterator[tuple[Sequence[str], np.ndarray]]:
        chosen: dict[str, np.ndarray] = {}
        for number, (name, coefficients) in enumerate(items, start=1):
            check_customer_id(name)
            _check_fits(name, coefficients, manifest)
            if name in chosen:
                raise InputError(f"the customer {name} occurs twice")
            chosen[name] = coefficients.values
            if coefficients.thresholds:
                thresholds[number - 1] = coefficients.thresholds
            if len(chosen) == TOGETHER:
                yield list(chosen), np.stack(list(chosen.values()))
                chosen = {}
            if progress is not None:
                progress("packing", number, total)
        if chosen:
            yield list(chosen), np.stack(list(chosen.values()))

    try:
        return write_packed_blocks(rows(), path, manifest, dtype, thresholds)
    except EmptyError as error:
        raise InputError(f"{error}{f' in {source}' if isinstance(source, Path) else ''}") from None


def write_packed_blocks(
    blocks: Iterable[tuple[Sequence[str] | np.ndarray, np.ndarray]],
    path: Path,
    manifest: Manifest,
    dtype: str | None = None,
    thresholds: Mapping[int, Sequence[float]] | None = None,
) -> int:
    """As `write_packed`, from blocks of ids and their coefficients `[n, total_rank]`, fp32 or fp16.

    Ids are fastest as an array of bytes (`numpy.bytes_`). All customers have the bundle's task and
    labels; that they were trained on its base and basis is for the caller to know. `thresholds` are those of
    multi-label customers who have some, by their row, rising; they are read after the last block.

    Raises:
        InputError: there is no customer, an id is none or occurs twice, or numbers have another
            shape, are NaN, Inf, or more than fp16 can hold.
    """
    stored = STORED[dtype or manifest.table_dtype]
    empty = PackedHeader(metadata_of(manifest), 0, manifest.total_rank, 0, stored)
    return write_blocks_under(empty, blocks, path, {} if thresholds is None else thresholds)


def write_blocks_under(
    header: PackedHeader,
    blocks: Iterable[tuple[Sequence[str] | np.ndarray, np.ndarray]],
    path: Path,
    thresholds: Mapping[int, Sequence[float]],
) -> int:
    """As `write_packed_blocks`, where a header without customers says what the file is for.

    Raises:
        InputError: as `write_packed_blocks`.
    """
    lengths: list[np.ndarray] = []
    texts: list[bytes] = []
    with (
        atomic_file(path) as temporary,
        temporary.open("wb", buffering=0) as file,
        ThreadPoolExecutor(THREADS, thread_name_prefix="packed-digest") as pool,
    ):
        file.write(header.to_bytes(NO_DIGEST))
        rows = _Rows(file, header, pool)
        for names, values in blocks:
            block_lengths, text = encode_ids(names)
            lengths.append(block_lengths)
            texts.append(text)
            _check_values(names, values, header)
            rows.add(values)
        if not lengths:
            raise EmptyError("there is no customer to pack")
        index = np.concatenate(lengths), b"".join(texts)
        # Once more at the end: only now all ids are there, to see that none occurs twice.
        customers = len(IdIndex(*index))
        digests = rows.finish()
        tail = index[0].tobytes() + index[1] + threshold_bytes(thresholds)
        digests += pool.map(digest_piece, tail_pieces(memoryview(tail)))
        _write_all(file, tail)
        file.seek(0)
        header = replace(header, customers=customers, id_bytes=len(index[1]), tuned=len(thresholds))
        file.write(header.to_bytes(header.seal(digests)))
    return customers


class EmptyError(InputError):
    """There is nothing to write."""


class _Rows:
    """Rows on their way into the file, in pieces that are hashed while the next ones come."""

    def __init__(self, file: BinaryIO, header: PackedHeader, pool: ThreadPoolExecutor) -> None:
        self._file, self._pool = file, pool
        shape = (header.piece_rows, header.total_rank)
        self._buffers = deque(np.empty(shape, dtype=STORED_DTYPES[header.stored]) for _ in range(THREADS + 1))
        self._hashed: deque[Future[bytes]] = deque()
        self._digests: list[bytes] = []
        self._filled = 0

    def add(self, values: np.ndarray) -> None:
        """Take rows `[n, total_rank]`."""
        done = 0
        while done < len(values):
            buffer = self._buffers[0]
            count = min(len(buffer) - self._filled, len(values) - done)
            buffer[self._filled : self._filled + count] = values[done : done + count]
            self._filled += count
            done += count
            if self._filled == len(buffer):
                self._send()

    def finish(self) -> list[bytes]:
        """Write what is left; returns the digests of all pieces."""
        if self._filled:
            self._send()
        return self._digests + [future.result() for future in self._hashed]

    def _send(self) -> None:
        piece = self._buffers[0][: self._filled]
        self._hashed.append(self._pool.submit(digest_piece, piece.data))
        _write_all(self._file, piece.data.cast("B"))
        self._buffers.rotate(-1)
        self._filled = 0
        # The buffer that is filled next must have been hashed.
        if len(self._hashed) == len(self._buffers):
            self._digests.append(self._hashed.popleft().result())


def _write_all(file: BinaryIO, content: "bytes | memoryview") -> None:
    """Write everything: without a buffer, a single call may write less than it was given."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _items_of(source: Path | Iterable[tuple[str, Coefficients]]) -> tuple[int, Iterable[tuple[str, Coefficients]]]:
    if not isinstance(source, Path):
        return 0, source
    names = sorted(customer_ids(source))
    return len(names), ((name, read_customer(source, name)) for name in names)


def _check_fits(name: str, coefficients: Coefficients, manifest: Manifest) -> None:
    check_customer_fits(coefficients, manifest, name)
    if coefficients.head:
        raise InputError(
            f"{name} has a head of its own, for which a packed file has no room; leave it a file of its own"
        )
    if coefficients.labels != manifest.labels:
        raise InputError(f"{name} has other labels than the bundle")


def _check_values(names: Sequence[str] | np.ndarray, values: np.ndarray, header: PackedHeader) -> None:
    if values.shape != (len(names), header.total_rank) or values.dtype not in (np.float32, np.float16):
        shape = f"{list(values.shape)} {values.dtype}"
        raise InputError(f"{len(names)} customers need coefficients [{len(names)}, {header.total_rank}], not {shape}")
    finite = np.isfinite(values)
    if not finite.all():
        raise InputError(f"{_name(names, int(finite.all(axis=1).argmin()))} holds NaN or Inf")
    if header.stored == "F16" and values.dtype == np.float32:
        largest = np.abs(values).max(axis=1)
        try:
            check_half_range(largest)
        except InputError as error:
            raise InputError(f"{_name(names, int(largest.argmax()))}: {error}") from error


def _name(names: Sequence[str] | np.ndarray, row: int) -> str:
    name = names[row]
    return name.decode("latin-1") if isinstance(name, bytes) else str(name)
