"""Packed files that are refused, and forged ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.customers import packed_header
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.customers.packed_header import PackedHeader, digest_piece, metadata_of, tail_pieces
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession

THRESHOLDS = (0.1, 0.5, 0.25, 0.9)
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


def scaled(customer: Coefficients, number: float) -> Coefficients:
    return replace(customer, values=customer.values * np.float32(number))


def empty(session: SwitchableSession) -> SwitchableSession:
    for name in session.customers():
        session.unload(name)
    return session


def refuse(session: SwitchableSession, path: Path, content: bytes, error: type[InputError] = FileFormatError) -> str:
    """Load `content`, which must be refused and change nothing; returns the message."""
    other = path.with_name("other.safetensors")
    other.write_bytes(content)
    before, free = session.customers(), sorted(session.table._free)
    with pytest.raises(error) as caught:
        load_packed(session, other)
    assert str(caught.value).startswith(str(other))
    assert session.customers() == before and sorted(session.table._free)[: len(free)] == free
    return str(caught.value)


def forged(session: SwitchableSession, values: np.ndarray, names: list[bytes], **changes: Any) -> bytes:
    """A file with a digest that is right, as somebody with this source code could make it."""
    text = b"".join(names)
    sizes = changes.pop("sizes", (len(values), values.shape[1], len(text)))
    stored = changes.pop("stored", "F32")
    tuned, end = changes.pop("tuned", (0, b""))
    header = PackedHeader(metadata_of(session.manifest) | changes, *sizes, stored, tuned)
    body, tail = values.astype({"F16": "<f2"}.get(stored, "<f4")).tobytes(), bytes(map(len, names)) + text + end
    step = header.piece_rows * header.row_bytes if stored in packed_header.STORED_DTYPES else len(body)
    pieces = [memoryview(body)[start : start + step] for start in range(0, len(body), step)]
    digests = map(digest_piece, [*pieces, *tail_pieces(memoryview(tail))])
    return header.to_bytes(header.seal(digests)) + body + tail
