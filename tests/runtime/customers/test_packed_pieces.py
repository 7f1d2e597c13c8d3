"""Packed files of fp16 rows and of many pieces: round trips, damage in every piece, and what a hostile one may hold."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.bundle.bundle import Manifest, open_bundle
from qrlora_deploy.runtime.bundle.row_layout import TABLE, TABLE_DTYPES, TableLayout
from qrlora_deploy.runtime.customers import packed_header
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.customers.packed_writer import write_packed, write_packed_blocks
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.runtime.table.memory import make_memory
from qrlora_deploy.runtime.table.table import CoefficientTable, TableFullError
from tests.runtime.customers.packing import forged, refuse

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
DTYPES = st.sampled_from(["fp32", "fp16"])


@pytest.fixture(scope="module")
def bundle_session(switchable: Path) -> SwitchableSession:
    return SwitchableSession(open_bundle(switchable), threads=1)


@pytest.fixture
def manifest(bundle_session: SwitchableSession) -> Manifest:
    return bundle_session.manifest


def with_table(session: SwitchableSession, dtype: str, max_rows: int | None = None) -> SwitchableSession:
    """A session without a graph whose empty table is of another dtype."""
    other = SwitchableSession.__new__(SwitchableSession)
    other.manifest, other.base_head, other.fetch = session.manifest, None, None
    other.layout = TableLayout(session.layout.ranks, dtype)
    dtypes = {TABLE: TABLE_DTYPES[dtype]}
    other.table = CoefficientTable(
        lambda rows: make_memory({TABLE: other.layout.width}, rows, "cpu", dtypes), 2, max_rows
    )
    return other


def rows(session: SwitchableSession, names: list[str]) -> np.ndarray:
    held, missing = session.table.hold(names)
    assert missing == []
    part = session.table.memory.parts[TABLE]
    found = np.concatenate([part.read_rows(held[name], 1) for name in names])
    session.table.release(held.values())
    return found


def several(manifest: Manifest, count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    values = np.random.default_rng(seed).normal(size=(count, manifest.total_rank))
    return [f"c{number}" for number in range(count)], values.astype(np.float32)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    """Pieces of three customers in fp16."""
    monkeypatch.setattr(packed_header, "PIECE_BYTES", 3 * 2 * manifest.total_rank)


@SAME_FOLDER
@given(
    count=st.integers(1, 40),
    stored=DTYPES,
    table=DTYPES,
    given_as=DTYPES,
    piece_bytes=st.integers(1, 9000),
    block=st.integers(1, 40),
)
def test_rows_are_those_that_were_packed(
    tmp_path: Path,
    bundle_session: SwitchableSession,
    count: int,
    stored: str,
    table: str,
    given_as: str,
    piece_bytes: int,
    block: int,
) -> None:
    session = with_table(bundle_session, table)
    names, values = several(session.manifest, count, seed=count)
    values = values.astype(TABLE_DTYPES[given_as])
    path = tmp_path / "packed.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_header, "PIECE_BYTES", piece_bytes)
        parts = ((names[at : at + block], values[at : at + block]) for at in range(0, count, block))
        assert write_packed_blocks(parts, path, session.manifest, stored) == count
        assert load_packed(session, path) == count
    expected = values.astype(TABLE_DTYPES[stored]).astype(np.float32)
    found = rows(session, names)
    assert found.dtype == TABLE_DTYPES[table]
    np.testing.assert_array_equal(found, np.stack([session.layout.row(row) for row in expected]))
    assert session.customers() == names and path.stat().st_size < 4096 + count * (4 * values.shape[1] + 8)


def test_customers_one_by_one_and_in_blocks_make_the_same_file(
    tmp_path: Path, manifest: Manifest, tiny_customer: Coefficients
) -> None:
    names, values = several(manifest, 600)
    one, many = tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    for dtype in ("fp32", "fp16"):
        customers = [(name, replace(tiny_customer, values=row)) for name, row in zip(names, values, strict=True)]
        write_packed(customers, one, manifest, dtype=dtype)
        blocks: list[Any] = [(np.array(names[:1], dtype=np.bytes_), values[:1]), (names[1:], values[1:])]
        write_packed_blocks(blocks, many, manifest, dtype)
        assert one.read_bytes() == many.read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_changed_byte_in_any_piece_is_refused(
    tmp_path: Path, bundle_session: SwitchableSession, pieces: None, dtype: str
) -> None:
    session = with_table(bundle_session, "fp16")
    names, values = several(session.manifest, 20)
    path = tmp_path / "packed.safetensors"
    write_packed_blocks([(names, values)], path, session.manifest, dtype)
    whole = path.read_bytes()
    row_bytes = TABLE_DTYPES[dtype].itemsize * session.manifest.total_rank
    for place in [*range(4096 + 1, len(whole), row_bytes), len(whole) - 1]:
        refuse(session, path, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refuse(session, path, whole[:place])
    # Two rows that have changed places, and two pieces.
    first, rest = 4096, 4096 + 2 * row_bytes
    swapped = whole[:first] + whole[first + row_bytes : rest] + whole[first : first + row_bytes] + whole[rest:]
    assert "content digest does not fit" in refuse(session, path, swapped)
    assert len(session.table) == 0 and load_packed(session, path) == 20


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF])
@pytest.mark.parametrize("place", [0, 7, 19])
def test_half_numbers_that_are_none_are_refused(
    tmp_path: Path, bundle_session: SwitchableSession, pieces: None, bits: int, place: int
) -> None:
    session = with_table(bundle_session, "fp16")
    names, values = several(session.manifest, 20)
    half = values.astype(np.float16)
    half.view(np.uint16)[place, -1] = bits
    ids = [name.encode() for name in names]
    assert "NaN or Inf" in refuse(session, tmp_path / "x", forged(session, half, ids, stored="F16"))
    # The largest number there is.
    half.view(np.uint16)[place, -1] = 0x7BFF
    fine = tmp_path / "fine.safetensors"
    fine.write_bytes(forged(session, half, ids, stored="F16"))
    assert load_packed(session, fine) == 20
    np.testing.assert_array_equal(rows(session, names), [session.layout.row(row.astype(np.float32)) for row in half])


@pytest.mark.parametrize("stored", ["F64", "BF16", "U8", "f16", "", None, 5, ["F16"]])
def test_another_dtype_is_refused(tmp_path: Path, bundle_session: SwitchableSession, stored: Any) -> None:
    names, values = several(bundle_session.manifest, 2)
    content = forged(bundle_session, values, [name.encode() for name in names])
    wrong = content[:4096].replace(b'"F32"', b'"F16"')
    assert "is not as it was" in refuse(bundle_session, tmp_path / "x", wrong + content[4096:])
    changed = content[:4096].replace(b'"F32"', repr(stored).replace("'", '"').replace("None", "null").encode())
    header = changed.rstrip(b" ").ljust(4096)[:4096]
    message = refuse(bundle_session, tmp_path / "x", header + content[4096:])
    assert "holds coefficients in" in message or "is not a qrlora-packed file" in message


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path, bundle_session: SwitchableSession) -> None:
    session = with_table(bundle_session, "fp16")
    names, values = several(session.manifest, 4)
    values[2, 5] = -70000
    path = tmp_path / "packed.safetensors"
    with pytest.raises(InputError, match=r"^c2: the coefficient 7e\+04 is more than fp16 can hold"):
        write_packed_blocks([(names, values)], path, session.manifest, "fp16")
    assert not path.exists()
    write_packed_blocks([(names, values)], path, session.manifest, "fp32")
    with pytest.raises(
        InputError, match=r"packed\.safetensors holds a coefficient of 7e\+04, more than the fp16 table"
    ):
        load_packed(session, path)
    assert len(session.table) == 0
    assert load_packed(with_table(bundle_session, "fp32"), path) == 4


UNFIT: list[tuple[list[str], Any, str]] = [
    (["a"], np.zeros((1, 3), np.float32), r"1 customers need coefficients \[1, \d+\], not \[1, 3\] float32"),
    (["a", "b"], None, r"2 customers need coefficients \[2, \d+\], not \[1,"),
    (["a"], np.float64, "float64"),
    (["../a"], None, "is no customer id"),
    (["first"], None, "the customer first occurs twice"),
]


@pytest.mark.parametrize("case", range(len(UNFIT)))
def test_blocks_that_do_not_fit_are_refused(tmp_path: Path, manifest: Manifest, case: int) -> None:
    names, values, message = UNFIT[case]
    row = np.ones((1, manifest.total_rank), dtype=np.float32)
    if values is None:
        values = row
    elif values is np.float64:
        values = row.astype(np.float64)
    path = tmp_path / "packed.safetensors"
    for repeated in (names, np.array(names, dtype=np.bytes_)):
        with pytest.raises(InputError, match=message):
            write_packed_blocks([(["first"], row), (repeated, values)], path, manifest)
    with pytest.raises(InputError, match="there is no customer to pack"):
        write_packed_blocks([], path, manifest)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_cut_while_it_is_read_is_refused(
    tmp_path: Path, bundle_session: SwitchableSession, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = with_table(bundle_session, "fp16")
    names, values = several(session.manifest, 30)
    path = tmp_path / "packed.safetensors"
    write_packed_blocks([(names, values)], path, session.manifest, "fp16")
    original, calls = packed_header._read_at, iter(range(1000))

    def cut(*arguments: Any) -> int:
        return 0 if next(calls) == 6 else original(*arguments)

    free = sorted(session.table._free)
    with monkeypatch.context() as patch:
        patch.setattr(packed_header, "_read_at", cut)
        with pytest.raises(FileFormatError, match="is cut"):
            load_packed(session, path)
    assert len(session.table) == 0 and sorted(session.table._free)[: len(free)] == free
    # Where the system cannot read at a place, a seek does the same.
    monkeypatch.delattr(os, "preadv", raising=False)
    assert load_packed(session, path) == 30
    np.testing.assert_array_equal(rows(session, names), [session.layout.row(row) for row in values])


def test_a_table_with_too_few_rows_takes_none(tmp_path: Path, bundle_session: SwitchableSession) -> None:
    session = with_table(bundle_session, "fp16", max_rows=10)
    names, values = several(session.manifest, 10)
    path = tmp_path / "packed.safetensors"
    write_packed_blocks([(names, values)], path, session.manifest)
    with pytest.raises(TableFullError, match="no more than 10"):
        load_packed(session, path)
    assert len(session.table) == 0


def test_swaps_and_another_file_over_a_packed_one(tmp_path: Path, bundle_session: SwitchableSession) -> None:
    """Rows of a second file, of single swaps and of removals, beside a run that holds the first ones."""
    session = with_table(bundle_session, "fp16")
    names, values = several(session.manifest, 200)
    path = tmp_path / "packed.safetensors"

    def load(chosen: list[int], factor: float) -> None:
        blocks: Iterator[Any] = iter([([names[i] for i in chosen], factor * values[chosen])])
        write_packed_blocks(blocks, path, session.manifest, "fp16")
        load_packed(session, path)

    load(list(range(200)), 1.0)
    held, _ = session.table.hold(names[:50])
    memory = session.table.memory
    before = memory.parts[TABLE].read_rows(0, memory.rows)
    for number in (3, 60):
        session.table.publish(names[number], {TABLE: session.layout.row(5 * values[number])})
    session.table.remove(names[4])
    load(list(range(40, 120)), 2.0)
    for number in (41, 150):
        session.table.publish(names[number], {TABLE: session.layout.row(7 * values[number])})
    factors = np.ones(200, dtype=np.float32)
    factors[40:120], factors[3], factors[41], factors[150] = 2, 5, 7, 7
    left = [number for number in range(200) if number != 4]
    expected = [session.layout.row(factors[number] * values[number]) for number in left]
    np.testing.assert_array_equal(rows(session, [names[number] for number in left]), np.stack(expected))
    assert sorted(session.customers()) == sorted(names[number] for number in left) and len(session.table) == 199
    for row in held.values():
        np.testing.assert_array_equal(memory.parts[TABLE].read_rows(row, 1)[0], before[row])
    session.table.release(held.values())
    assert len(session.table._free) == session.table.memory.rows - 1 - 199
