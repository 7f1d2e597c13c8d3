"""Very many customers in one file, which fills the table of a switchable session in one go.

A safetensors file with the tensors `coefficients [n, total_rank]` fp32, `id_lengths [n]` and
`id_bytes [sum of the lengths]` uint8, in this order. It is read front to back once; the digest in
its metadata covers every byte, and nothing goes live before it was found right.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from qrlora_deploy.coefficients import Coefficients
from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError
from qrlora_deploy.files import atomic_file
from qrlora_deploy.runtime.bundle import Manifest
from qrlora_deploy.runtime.customer_files import MAX_ID_CHARACTERS, check_customer_id, customer_ids, read_customer
from qrlora_deploy.runtime.fitting import check_customer_fits
from qrlora_deploy.runtime.layout import HEAD_TABLE, TABLE, TableLayout
from qrlora_deploy.runtime.packed_header import NO_DIGEST, PackedHeader, metadata_of, read_exactly, read_header
from qrlora_deploy.runtime.switchable import SwitchableSession

BLOCK_BYTES = 4 * 2**20
"""Of coefficients that are read, hashed and copied together: small enough for a processor's cache."""

Progress = Callable[[str, int, int], None]


def write_packed(
    source: Path | Iterable[tuple[str, Coefficients]],
    path: Path,
    manifest: Manifest,
    progress: Progress | None = None,
) -> int:
    """Write customers of one switchable bundle into one file, replacing `path` in one step.

    Args:
        source: a folder of `<id>.safetensors`, taken in the order of their ids, or customers by id.
        path: the file to write.
        manifest: the bundle's; every customer must fit it.
        progress: called with (description, done, total); total is 0 where it is not known.

    Returns:
        The number of customers.

    Raises:
        InputError: there is no customer, or one does not fit the bundle, has a head of its own or
            occurs twice; it is named.
    """
    total, items = _items_of(source)
    header = PackedHeader(metadata_of(manifest), 0, manifest.total_rank, 0)
    names: dict[str, None] = {}
    digest = hashlib.sha256()
    with atomic_file(path) as temporary, temporary.open("wb", buffering=BLOCK_BYTES) as file:
        file.write(header.to_bytes(NO_DIGEST))
        for name, coefficients in items:
            check_customer_id(name)
            if name in names:
                raise InputError(f"the customer {name} occurs twice")
            _check_fits(name, coefficients, manifest)
            names[name] = None
            values = np.ascontiguousarray(coefficients.values, dtype="<f4").tobytes()
            digest.update(values)
            file.write(values)
            if progress is not None:
                progress("packing", len(names), total)
        if not names:
            raise InputError(f"there is no customer to pack{f' in {source}' if isinstance(source, Path) else ''}")
        text = "".join(names).encode("ascii")
        tail = bytes(map(len, names)) + text
        digest.update(tail)
        file.write(tail)
        file.seek(0)
        header = PackedHeader(header.metadata, len(names), header.total_rank, len(text))
        file.write(header.to_bytes(header.seal(digest)))
    return len(names)


def load_packed(session: SwitchableSession, path: Path, progress: Progress | None = None) -> int:
    """Make every customer of a packed file live in `session`; those that are loaded already change.

    Either all of them go live or, on any error, none. Load it before a `CustomerStore` starts: the
    files of the store's folder then win over the packed ones.

    Args:
        session: a session on the bundle for which the file was packed.
        path: the file.
        progress: called with (description, done, total) of customers.

    Returns:
        The number of customers.

    Raises:
        FileFormatError: the file is cut, changed, of another format version, or holds NaN or Inf.
        InputError: it cannot be read, belongs to another bundle, or has more customers than the
            table may hold. QrloraError: the table cannot grow.
    """
    try:
        with path.open("rb", buffering=0) as file:
            header, expected, start = read_header(file, path)
            _check_bundle(header, path, session.manifest)
            ids_at = start + 4 * header.customers * header.total_rank
            file.seek(ids_at)
            tail = bytearray(header.customers + header.id_bytes)
            read_exactly(file, memoryview(tail), path)
            names = _names_of(tail, header.customers, path)
            file.seek(start)
            session.table.publish_many(names, _blocks(session, file, path, header, tail, expected, progress))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return header.customers


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
    if not np.isfinite(coefficients.values).all():
        raise InputError(f"{name} holds NaN or Inf")


def _check_bundle(header: PackedHeader, path: Path, manifest: Manifest) -> None:
    expected = metadata_of(manifest)
    for name in ("basis_digest", "base_digest"):
        if header.metadata.get(name) != expected[name]:
            found = str(header.metadata.get(name))[:12]
            raise BasisMismatchError(
                f"{path} was packed for {name} {found}, but the bundle holds {expected[name][:12]}"
            )
    if header.metadata != expected or header.total_rank != manifest.total_rank:
        raise InputError(f"{path} has another task, other labels or another number of coefficients than the bundle")


def _names_of(tail: bytearray, count: int, path: Path) -> list[str]:
    """Ids from their lengths and their bytes, checked as `check_customer_id` does."""
    lengths = np.frombuffer(tail, dtype=np.uint8, count=count)
    ends = np.cumsum(lengths, dtype=np.int64)
    if lengths.min() == 0 or lengths.max() > MAX_ID_CHARACTERS or ends[-1] != len(tail) - count:
        raise FileFormatError(f"{path}: the lengths of its customers' ids make no sense")
    try:
        text = tail[count:].decode("ascii")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} holds ids that are none") from error
    stops = ends.tolist()
    names = [text[start:stop] for start, stop in zip((0, *stops), stops, strict=False)]
    try:
        for name in names:
            check_customer_id(name)
    except InputError as error:
        raise FileFormatError(f"{path}: {error}") from error
    if len(set(names)) != count:
        raise FileFormatError(f"{path} holds a customer twice")
    return names


def _blocks(
    session: SwitchableSession,
    file: io.FileIO,
    path: Path,
    header: PackedHeader,
    tail: bytearray,
    expected: str,
    progress: Progress | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Rows of the table, block after block; the last step compares the digest."""
    layout, digest = session.layout, hashlib.sha256()
    block_rows = max(1, BLOCK_BYTES // (4 * header.total_rank))
    # Two, by turns: while one is hashed by the other thread, the next is read.
    buffers = [np.empty((block_rows, header.total_rank), dtype="<f4") for _ in range(2)]
    rows = np.zeros((block_rows, layout.width), dtype=np.float32)
    hashed = None
    with ThreadPoolExecutor(1, thread_name_prefix="packed-digest") as pool:
        for index, first in enumerate(range(0, header.customers, block_rows)):
            count = min(block_rows, header.customers - first)
            values = buffers[index % 2][:count]
            read_exactly(file, values.data.cast("B"), path)
            if hashed is not None:
                hashed.result()
            hashed = pool.submit(digest.update, values.data)
            if not np.isfinite(values).all():
                raise FileFormatError(f"{path} holds NaN or Inf")
            _spread(values, rows[:count], layout)
            block = {TABLE: rows[:count]}
            if session.base_head is not None:
                block[HEAD_TABLE] = np.broadcast_to(session.base_head, (count, len(session.base_head)))
            yield block
            if progress is not None:
                progress("loading", first + count, header.customers)
        if hashed is not None:
            hashed.result()
    digest.update(tail)
    if header.seal(digest) != expected:
        raise FileFormatError(f"{path} was changed after it was written: its content digest does not fit")


def _spread(values: np.ndarray, rows: np.ndarray, layout: TableLayout) -> None:
    """`values [n, total_rank]` to `rows [n, width]`, whose padding is zero already."""
    source = place = 0
    for rank, padded in zip(layout.ranks, layout.padded_ranks, strict=True):
        rows[:, place : place + rank] = values[:, source : source + rank]
        source, place = source + rank, place + padded
