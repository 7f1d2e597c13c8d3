"""The head of a packed file: what it is for and its sizes, with one way only to write them; and its digest.

The digest covers pieces: of so many rows of coefficients as fill `PIECE_BYTES`, and then of that many
bytes of what follows. Each has a SHA-256 of its own, so that they can be read and hashed beside one another;
the file's is that of theirs, one after the other, and of the header without it.
"""

import hashlib
import io
import json
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from qrlora_deploy.errors import FileFormatError
from qrlora_deploy.io.reading import parse_json
from qrlora_deploy.io.sealing import MAX_METADATA_BYTES, METADATA_KEY
from qrlora_deploy.io.strict import Record, from_value
from qrlora_deploy.io.versions import Versions
from qrlora_deploy.runtime.bundle.bundle import Manifest

FORMAT = "qrlora-packed"
VERSIONS = Versions(3, {2: dict}, remedy="pack it again")
"""Version 2 has no thresholds; its record is the same."""

FIRST_WITH_THRESHOLDS = 3

PIECE_BYTES = 4 * 2**20

STORED_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
"""What the coefficients may be in the file, by safetensors' names."""

HEADER_STEP = 4096
THRESHOLD_BYTES = 8
"""Of a threshold, and of the number of a customer who has some."""

NO_DIGEST = "0" * 64
WIDEST = 10**15
"""A number of customers and bytes that never occurs: room is left in the header for its digits."""


class _Tensor(Record):
    """How safetensors describes a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class _Stored(Record):
    """A header as it is stored; its two texts are JSON and have models of their own."""

    metadata: dict[str, str] = Field(alias="__metadata__")
    coefficients: _Tensor
    id_lengths: _Tensor
    id_bytes: _Tensor
    threshold_rows: _Tensor | None = None
    thresholds: _Tensor | None = None


class _Metadata(BaseModel):
    """What the metadata say; the header that is written anew has no room for anything else."""

    basis_digest: str
    base_digest: str
    task: str
    labels: list[str]
    content_digest: str


@dataclass(frozen=True)
class PackedHeader:
    """Metadata and sizes of a packed file; the same always gives the same bytes.

    Attributes:
        stored: dtype of the coefficients, a key of `STORED_DTYPES`.
        tuned: customers with thresholds.
    """

    metadata: dict[str, Any]
    customers: int
    total_rank: int
    id_bytes: int
    stored: str = "F32"
    tuned: int = 0

    @property
    def labels(self) -> list[str]:
        """Names of the outputs of all customers."""
        found: list[str] = self.metadata["labels"]
        return found

    @property
    def tail_bytes(self) -> int:
        """Of everything behind the coefficients."""
        return self.customers + self.id_bytes + self.tuned * (1 + len(self.labels)) * THRESHOLD_BYTES

    @property
    def row_bytes(self) -> int:
        """Of a customer's coefficients."""
        return STORED_DTYPES[self.stored].itemsize * self.total_rank

    @property
    def piece_rows(self) -> int:
        """Customers of a piece."""
        return max(1, PIECE_BYTES // self.row_bytes)

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return len(self.to_bytes(NO_DIGEST)) + self.customers * self.row_bytes + self.tail_bytes

    def to_bytes(self, digest: str) -> bytes:
        """The file up to its tensors: the length, JSON, and spaces up to a size that `customers` does not change."""
        room = len(self._json(NO_DIGEST, WIDEST, WIDEST, WIDEST))
        size = -(-(8 + room) // HEADER_STEP) * HEADER_STEP - 8
        text = self._json(digest, self.customers, self.id_bytes, self.tuned)
        return struct.pack("<Q", size) + text.ljust(size)

    def _json(self, digest: str, customers: int, id_bytes: int, tuned: int) -> bytes:
        record = self.metadata | {"content_digest": digest}
        first = customers * self.row_bytes
        second = first + customers
        third = second + id_bytes
        header = {
            "__metadata__": {METADATA_KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))},
            "coefficients": {"dtype": self.stored, "shape": [customers, self.total_rank], "data_offsets": [0, first]},
            "id_lengths": {"dtype": "U8", "shape": [customers], "data_offsets": [first, second]},
            "id_bytes": {"dtype": "U8", "shape": [id_bytes], "data_offsets": [second, third]},
        }
        if self.metadata["format_version"] >= FIRST_WITH_THRESHOLDS:
            fourth, labels = third + tuned * THRESHOLD_BYTES, len(self.labels)
            end = fourth + tuned * labels * THRESHOLD_BYTES
            header |= {
                "threshold_rows": {"dtype": "I64", "shape": [tuned], "data_offsets": [third, fourth]},
                "thresholds": {"dtype": "F64", "shape": [tuned, labels], "data_offsets": [fourth, end]},
            }
        return json.dumps(header, separators=(",", ":")).encode()

    def seal(self, pieces: Iterable[bytes]) -> str:
        """The digest of the file, from those of its pieces."""
        digest = hashlib.sha256(b"".join(pieces))
        digest.update(self.to_bytes(NO_DIGEST))
        return digest.hexdigest()


def metadata_of(manifest: Manifest) -> dict[str, Any]:
    """What a packed file says of the bundle for which it is."""
    return metadata_for(manifest.basis_digest, manifest.base_digest, manifest.task, manifest.labels)


def metadata_for(basis_digest: str, base_digest: str, task: str, labels: Sequence[str]) -> dict[str, Any]:
    """What a packed file says of bundles of these."""
    return {
        "format": FORMAT,
        "format_version": VERSIONS.current,
        "basis_digest": basis_digest,
        "base_digest": base_digest,
        "task": task,
        "labels": list(labels),
    }


def facts_of(header: PackedHeader, path: Path) -> dict[str, Any]:
    """What `metadata_of` gave when the file was written, as the current version has it."""
    return VERSIONS.upgraded(path, header.metadata, f"{path} is not a {FORMAT} file")


def read_header(file: io.FileIO, path: Path) -> tuple[PackedHeader, str, int]:
    """The header, the digest it names, and where the tensors begin.

    Raises:
        FileFormatError: it is not a packed file of this version, is cut, or its header was changed.
    """
    size_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size_bytes
    if not 0 < length <= min(size_bytes - 8, 2 * MAX_METADATA_BYTES):
        raise FileFormatError(f"{path} is not a complete safetensors file")
    text = bytearray(length)
    read_exactly(file, len(prefix), memoryview(text), path)
    wrong = f"{path} is not a {FORMAT} file"
    stored = from_value(_Stored, parse_json(_text(text, wrong), wrong), wrong)
    metadata = parse_json(stored.metadata.get(METADATA_KEY, ""), wrong)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise FileFormatError(wrong)
    VERSIONS.check(path, metadata.get("format_version"))
    digest = from_value(_Metadata, metadata, wrong).content_digest
    del metadata["content_digest"]
    header = PackedHeader(metadata, *_sizes(stored, wrong), stored.coefficients.dtype, _tuned(stored, wrong))
    if header.stored not in STORED_DTYPES:
        raise FileFormatError(f"{path} holds coefficients in {header.stored!r:.20}, not {' or '.join(STORED_DTYPES)}")
    # The one way to write this header: so no byte of it can change unnoticed.
    canonical = header.to_bytes(digest) == prefix + text
    start = 8 + length
    if not canonical:
        raise FileFormatError(f"{path} was changed after it was written: its header is not as it was")
    if size_bytes != header.size_bytes:
        raise FileFormatError(f"{path} is cut or has bytes too many")
    return header, digest, start


def _text(content: bytearray, wrong: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(wrong) from error


def _sizes(stored: _Stored, wrong: str) -> tuple[int, int, int]:
    """Customers, coefficients of each, and bytes of ids."""
    sizes = [*stored.coefficients.shape, *stored.id_bytes.shape]
    if len(sizes) != 3 or len(stored.id_bytes.shape) != 1:
        raise FileFormatError(f"{wrong}: its tensors have other shapes")
    # Bounded: a number of a million digits takes long to write.
    if not all(0 < size < WIDEST for size in sizes):
        raise FileFormatError(f"{wrong}: its sizes make no sense")
    return sizes[0], sizes[1], sizes[2]


def _tuned(stored: _Stored, wrong: str) -> int:
    """Customers with thresholds."""
    shape = stored.threshold_rows.shape if stored.threshold_rows is not None else [0]
    if len(shape) != 1 or not 0 <= shape[0] < WIDEST:
        raise FileFormatError(f"{wrong}: its tensors have other shapes")
    return shape[0]


def tail_pieces(tail: memoryview) -> list[memoryview]:
    """The pieces of what is behind the coefficients."""
    return [tail[start : start + PIECE_BYTES] for start in range(0, len(tail), PIECE_BYTES)]


def digest_piece(piece: memoryview) -> bytes:
    """The digest of a piece; other threads go on meanwhile."""
    return hashlib.sha256(piece).digest()


def read_exactly(file: io.FileIO, offset: int, view: memoryview, path: Path) -> None:
    """Fill `view` with the bytes from `offset` on, from any thread; nothing is mapped, as a file that is cut
    meanwhile would end the process.

    Raises:
        FileFormatError: the file ends before.
    """
    done = 0
    while done < len(view):
        count = _read_at(file, view[done:], offset + done)
        if not count:
            raise FileFormatError(f"{path} is cut")
        done += count


_seeking = threading.Lock()


def _read_at(file: io.FileIO, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [view], offset)
    with _seeking:
        file.seek(offset)
        return file.readinto(view) or 0
