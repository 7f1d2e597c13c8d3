"""Packed customers: round trip, every change refused, and the bulk into a table that is in use."""

import json
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import Manifest, open_bundle
from qrlora_deploy.runtime.bundle.row_layout import TABLE, TableLayout
from qrlora_deploy.runtime.customers import packed as packed_module
from qrlora_deploy.runtime.customers import packed_header
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.customers.packed_check import check_packed
from qrlora_deploy.runtime.customers.packed_header import PackedHeader, digest_piece, metadata_of, tail_pieces
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.runtime.table.id_index import IdIndex
from qrlora_deploy.runtime.table.memory import HostMemory, make_memory
from qrlora_deploy.runtime.table.table import CoefficientTable, TableFullError, rows_of
from qrlora_deploy.tasks.answering import Answering
from tests.runtime.bulks import publish_many
from tests.runtime.customers.test_store import ALLOWED
from tests.runtime.place import INPUTS

THRESHOLDS = (0.1, 0.5, 0.25, 0.9)
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
IDS = st.text(ALLOWED, min_size=1, max_size=128).filter(lambda name: name[0] != ".")


@pytest.fixture(scope="module")
def session(switchable: Path) -> SwitchableSession:
    return SwitchableSession(open_bundle(switchable), threads=1)


@pytest.fixture
def fresh(switchable: Path) -> SwitchableSession:
    return SwitchableSession(open_bundle(switchable), rows=2, threads=1)


@pytest.fixture
def manifest(session: SwitchableSession) -> Manifest:
    return session.manifest


@pytest.fixture
def sample(tmp_path: Path, manifest: Manifest, tiny_customer: Coefficients) -> Path:
    path = tmp_path / "sample.safetensors"
    customers = {name: scaled(tiny_customer, index) for index, name in enumerate(["a", "b.c", "d" * 128])}
    customers["b.c"] = replace(customers["b.c"], thresholds=THRESHOLDS)
    write_packed(customers.items(), path, manifest)
    return path


def scaled(customer: Coefficients, number: float) -> Coefficients:
    return replace(customer, values=customer.values * np.float32(number))


def empty(session: SwitchableSession) -> SwitchableSession:
    for name in session.customers():
        session.unload(name)
    return session


def rows(session: SwitchableSession, names: list[str]) -> np.ndarray:
    held, _ = session.table.hold(names)
    part = session.table.memory.parts[TABLE]
    assert isinstance(part, HostMemory)
    found: np.ndarray = part.array[rows_of(names, held)].copy()
    session.table.release(held.values())
    return found


@SAME_FOLDER
@given(
    names=st.lists(IDS, min_size=1, max_size=20, unique=True),
    seed=st.integers(0, 99),
    piece_bytes=st.integers(1, 20_000),
)
def test_pack_then_load_is_the_identity(
    tmp_path: Path,
    session: SwitchableSession,
    tiny_customer: Coefficients,
    names: list[str],
    seed: int,
    piece_bytes: int,
) -> None:
    random = np.random.default_rng(seed)
    customers = [
        replace(tiny_customer, values=random.normal(size=len(tiny_customer.values)).astype(np.float32)) for _ in names
    ]
    path = tmp_path / "packed.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_header, "PIECE_BYTES", piece_bytes)
        assert write_packed(zip(names, customers, strict=True), path, session.manifest) == len(names)
        assert load_packed(empty(session), path) == len(names)
    assert set(session.customers()) == set(names)
    expected = np.stack([session.layout.row(customer.values) for customer in customers])
    np.testing.assert_array_equal(rows(session, names), expected)
    # Any reader of safetensors can read it.
    tensors = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(tensors["coefficients"], np.stack([customer.values for customer in customers]))
    assert tensors["id_bytes"].tobytes().decode() == "".join(names)
    assert tensors["id_lengths"].tolist() == [len(name) for name in names]


def test_a_folder_is_packed_and_answers_the_same(
    tmp_path: Path, session: SwitchableSession, fresh: SwitchableSession, tiny_customer: Coefficients
) -> None:
    folder = tmp_path / "customers"
    folder.mkdir()
    for number in range(5):
        write_coefficients(scaled(tiny_customer, number), folder / f"c{number}.safetensors")
    (folder / ".c9.safetensors.1.tmp").write_bytes(b"half")
    steps: list[tuple[str, int, int]] = []
    path = tmp_path / "packed.safetensors"
    assert write_packed(folder, path, session.manifest, lambda *step: steps.append(step)) == 5
    first = path.read_bytes()
    write_packed(folder, path, session.manifest)
    assert path.read_bytes() == first, "the same content gives the same bytes"
    load_packed(fresh, path, lambda *step: steps.append(step))
    assert steps == [*(("packing", number, 5) for number in range(1, 6)), ("loading", 5, 5)]
    names = [None, *(f"c{number}" for number in range(5))]
    empty(session)
    for number in range(5):
        session.load(f"c{number}", folder / f"c{number}.safetensors")
    inputs = {name: np.repeat(array, 6, axis=0) for name, array in INPUTS.items()}
    np.testing.assert_array_equal(fresh.predict(inputs, names)[0], session.predict(inputs, names)[0])
    assert fresh.predict(inputs, names)[1] == [fresh.manifest.labels] * 6


@SAME_FOLDER
@given(data=st.data())
def test_any_changed_byte_is_refused(session: SwitchableSession, sample: Path, data: st.DataObject) -> None:
    changed = bytearray(sample.read_bytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    # Where it is the basis that is named, that is what is complained of.
    refuse(empty(session), sample, bytes(changed), InputError)


def test_every_byte_of_the_header_and_the_ids_counts(session: SwitchableSession, sample: Path) -> None:
    whole = sample.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    assert header == 4096 and whole[8:header].strip(b" ")[-1:] == b"}"
    for place in [*range(header), *range(len(whole) - 180, len(whole))]:
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        refuse(empty(session), sample, changed, InputError)


@SAME_FOLDER
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(session: SwitchableSession, sample: Path, data: st.DataObject) -> None:
    whole = sample.read_bytes()
    refuse(empty(session), sample, whole[: data.draw(st.integers(0, len(whole) - 1))])
    refuse(session, sample, whole + data.draw(st.binary(min_size=1, max_size=9)))


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


FORGED: dict[str, tuple[list[bytes], dict[str, Any], str]] = {
    "path": ([b"../x", b"b"], {}, "is no customer id"),
    "hidden": ([b".x", b"b"], {}, "is no customer id"),
    "nul": ([b"a\0", b"b"], {}, "is no customer id"),
    "empty": ([b"", b"b"], {}, "make no sense"),
    "long": ([b"x" * 129, b"b"], {}, "make no sense"),
    "latin": ([b"\xe9", b"b"], {}, "is no customer id"),
    "twice": ([b"b", b"b"], {}, "the customer b occurs twice"),
    "version": ([b"a", b"b"], {"format_version": 1}, "format version 1; this version reads 2 and 3; pack it again"),
    "kind": ([b"a", b"b"], {"format": "qrlora-basis"}, "is not a qrlora-packed file"),
    "task": ([b"a", b"b"], {"task": "text-regression"}, "another task"),
    "labels": ([b"a", b"b"], {"labels": ["x"]}, "other labels"),
    "more metadata": ([b"a", b"b"], {"extra": 1}, "another task"),
    "huge": ([b"a", b"b"], {"sizes": (10**14, 10**14, 10**14)}, "is cut"),
    "negative": ([b"a", b"b"], {"sizes": (-1, 10, 2)}, "is not a qrlora-packed file"),
    "none": ([b"a", b"b"], {"sizes": (0, 10, 2)}, "is not a qrlora-packed file"),
    "true": ([b"a", b"b"], {"sizes": (True, 10, 2)}, "is not a qrlora-packed file"),
}


def ends(*rows: int, value: float = 0.5) -> tuple[int, bytes]:
    """How many customers have thresholds, and the end of the file that says which."""
    return len(rows), struct.pack(f"<{len(rows)}q", *rows) + struct.pack("<d", value) * 4 * len(rows)


FORGED |= {
    "thresholds of nobody": ([b"a", b"b"], {"tuned": ends(2)}, "thresholds of customers that are not there"),
    "thresholds before all": ([b"a", b"b"], {"tuned": ends(-1)}, "thresholds of customers that are not there"),
    "thresholds twice": ([b"a", b"b"], {"tuned": ends(1, 1)}, "thresholds of customers that are not there"),
    "thresholds of 1": ([b"a", b"b"], {"tuned": ends(0, value=1.0)}, "between 0 and 1, not 1.0"),
    "thresholds of nan": ([b"a", b"b"], {"tuned": ends(0, value=float("nan"))}, "between 0 and 1, not nan"),
    "thresholds too early": ([b"a", b"b"], {"tuned": ends(0), "format_version": 2}, "has bytes too many"),
    "negative thresholds": ([b"a", b"b"], {"tuned": (-1, b"")}, "is not a qrlora-packed file"),
}


def test_thresholds_go_with_their_customers(
    tmp_path: Path, fresh: SwitchableSession, sample: Path, tiny_customer: Coefficients
) -> None:
    load_packed(fresh, sample)
    labels = fresh.manifest.labels
    names = ["a", "b.c", None, "d" * 128, "b.c"]
    inputs = {name: np.repeat(array, len(names), axis=0) for name, array in INPUTS.items()}
    found = fresh.run(inputs, names)[1]
    plain, own = Answering(labels), Answering(labels, THRESHOLDS)
    assert found == [plain, own, plain, plain, own] and fresh.predict(inputs, names)[1] == [labels] * 5
    loaded = replace(scaled(tiny_customer, 1), thresholds=THRESHOLDS)
    assert fresh.holds("b.c", loaded) and not fresh.holds("b.c", scaled(tiny_customer, 1))
    # Any reader of safetensors finds them, and a customer of its own file leaves none behind.
    tensors = safetensors.numpy.load_file(sample)
    assert tensors["threshold_rows"].tolist() == [1] and tensors["thresholds"].tolist() == [list(THRESHOLDS)]
    assert check_packed(sample).tuned == 1
    fresh.load("b.c", scaled(tiny_customer, 1))
    assert fresh.run(inputs, names)[1] == [plain] * 5


def test_a_file_of_version_2_is_read(fresh: SwitchableSession, tmp_path: Path) -> None:
    values = np.ones((2, fresh.layout.total_rank), np.float32)
    path = tmp_path / "older.safetensors"
    path.write_bytes(forged(fresh, values, [b"a", b"b"], format_version=2))
    assert "threshold_rows" not in safetensors.numpy.load_file(path)
    assert load_packed(fresh, path) == 2 and fresh.customers() == ["a", "b"]
    assert check_packed(path).customers == 2


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_refused(session: SwitchableSession, sample: Path, case: str) -> None:
    names, changes, message = FORGED[case]
    values = np.ones((2, session.layout.total_rank), np.float32)
    assert message in refuse(empty(session), sample, forged(session, values, names, **changes), InputError)


def test_nan_another_bundle_and_other_files_are_refused(
    session: SwitchableSession, sample: Path, tiny_customer_file: Path
) -> None:
    values = np.ones((2, session.layout.total_rank), np.float32)
    values[1, 3] = np.inf
    assert "NaN or Inf" in refuse(empty(session), sample, forged(session, values, [b"a", b"b"]))
    for name in ("basis_digest", "base_digest"):
        content = forged(session, np.ones_like(values), [b"a", b"b"], **{name: "e" * 64})
        assert f"{name} eeeeeeeeeeee" in refuse(session, sample, content, BasisMismatchError)
    content = forged(session, np.ones((2, 5), np.float32), [b"a", b"b"])
    assert "another number of coefficients" in refuse(session, sample, content, InputError)
    assert "is not a qrlora-packed file" in refuse(session, sample, tiny_customer_file.read_bytes())
    for text in (b"[]", b'{"__metadata__": {"qrlora": "[]"}}', b"[" * 5000, b"\xff"):
        refuse(session, sample, struct.pack("<Q", len(text)) + text)
    refuse(session, sample, struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(InputError, match=r"none\.safetensors cannot be read: No such file"):
        load_packed(session, sample.with_name("none.safetensors"))


UNFIT: dict[str, tuple[Callable[[Coefficients], Coefficients], str]] = {
    "head": (lambda it: replace(it, head={"w": np.ones((4, 32), np.float32)}), "acme has a head of its own"),
    "basis": (lambda it: replace(it, basis_digest="e" * 64), "acme was trained on basis eeeeeeeeeeee"),
    "base": (lambda it: replace(it, base_digest="e" * 64), "acme was trained on base eeeeeeeeeeee"),
    "task": (lambda it: replace(it, task="text-regression"), "acme is a text-regression"),
    "labels": (lambda it: replace(it, labels=("x",)), "acme has other labels"),
    "length": (lambda it: replace(it, values=it.values[1:]), "acme: expected"),
    "nan": (lambda it: replace(it, values=it.values * np.float32("nan")), "acme holds NaN"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_customer_that_does_not_fit_is_named(
    tmp_path: Path, manifest: Manifest, tiny_customer: Coefficients, case: str
) -> None:
    change, message = UNFIT[case]
    path = tmp_path / "packed.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=message):
        write_packed([("fine", tiny_customer), ("acme", change(tiny_customer))], path, manifest)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_nothing_twice_and_hostile_names_are_not_packed(
    tmp_path: Path, manifest: Manifest, tiny_customer: Coefficients
) -> None:
    path = tmp_path / "packed.safetensors"
    for names, message in (
        (["a", "b", "a"], "a occurs twice"),
        (["../a"], "is no customer id"),
        ([], "no customer to pack"),
    ):
        with pytest.raises(InputError, match=message):
            write_packed([(name, tiny_customer) for name in names], path, manifest)
    (tmp_path / "bad").mkdir()
    with pytest.raises(InputError, match="no customer to pack in .*bad"):
        write_packed(tmp_path / "bad", path, manifest)
    (tmp_path / "bad" / "x.safetensors").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"bad/x\.safetensors"):
        write_packed(tmp_path / "bad", path, manifest)
    assert not path.exists()


def test_loading_replaces_what_is_there(fresh: SwitchableSession, sample: Path, tiny_customer: Coefficients) -> None:
    head = {"w": np.ones((2, 32), np.float32)}
    fresh.load("a", replace(tiny_customer, head=head, labels=("x", "y")))
    fresh.load("other", scaled(tiny_customer, 7))
    held, _ = fresh.table.hold(["a"])
    memory, version = fresh.table.memory, fresh.table.note_of(held["a"])
    load_packed(fresh, sample)
    assert sorted(fresh.customers()) == ["a", "b.c", "d" * 128, "other"]
    # The run that began before keeps what it began with.
    part = memory.parts[TABLE]
    assert isinstance(part, HostMemory)
    np.testing.assert_array_equal(part.array[held["a"]], fresh.layout.row(tiny_customer.values))
    assert fresh.table.note_of(held["a"]) == version and version.answering == Answering(("x", "y"))
    fresh.table.release(held.values())
    expected = [fresh.layout.row(scaled(tiny_customer, number).values) for number in (0, 1, 7)]
    np.testing.assert_array_equal(rows(fresh, ["a", "b.c", "other"]), np.stack(expected))
    assert fresh.predict(INPUTS, ["a"])[1] == [fresh.manifest.labels]
    assert len(fresh.table._free) == fresh.table.memory.rows - 1 - 4


WIDTH = 16


def new_table(rows: int = 4, max_rows: int | None = None) -> CoefficientTable:
    return CoefficientTable(lambda count: make_memory({TABLE: WIDTH}, count, "cpu"), rows, max_rows)


def block(*numbers: float) -> dict[str, np.ndarray]:
    return {TABLE: np.repeat(np.array(numbers, np.float32)[:, None], WIDTH, axis=1)}


def test_a_bulk_that_fails_changes_nothing() -> None:
    table = new_table(rows=8)
    publish_many(table, ["a", "b"], [block(1, 2)], note="n")
    free = sorted(table._free)

    def breaks() -> Any:
        yield block(3)
        raise RuntimeError("the disk is gone")

    for names, blocks, error in (
        (["a", "c"], breaks(), RuntimeError),
        (["a", "c"], [block(3)], InputError),
        (["a", "c"], [block(3), block(4, 5)], InputError),
        (["a", "a"], [block(3, 4)], InputError),
        (["a"], [{TABLE: np.zeros((1, WIDTH + 1), np.float32)}], ValueError),
    ):
        with pytest.raises(error):
            publish_many(table, names, blocks)
    assert sorted(table._free) == free and table.customers() == ["a", "b"]
    held, _ = table.hold(["a", "b"])
    part = table.memory.parts[TABLE]
    assert isinstance(part, HostMemory)
    assert part.array[rows_of(["a", "b"], held)][:, 0].tolist() == [1, 2] and table.note_of(held["a"]) == "n"


def test_a_bulk_uses_the_gaps_and_never_pushes_out() -> None:
    table = new_table(rows=8, max_rows=8)
    for name in "abcdefg":
        table.publish(name, {TABLE: np.zeros(WIDTH, np.float32)})
    for name in "bdf":
        table.remove(name)
    with pytest.raises(TableFullError, match="4 customers need as many free rows, .* no more than 8, 4 of them in use"):
        publish_many(table, list("wxyz"), [block(1, 2, 3, 4)])
    publish_many(table, list("xyz"), [block(1), block(), block(2, 3)])
    assert sorted(table.customers()) == list("acegxyz") and list(table._free) == []
    held, _ = table.hold("axyz")
    part = table.memory.parts[TABLE]
    assert isinstance(part, HostMemory)
    assert part.array[rows_of("axyz", held)][:, 0].tolist() == [0, 1, 2, 3]


def test_bulks_grow_once_and_threads_never_see_a_mixture() -> None:
    made: list[int] = []

    def make(count: int) -> Any:
        made.append(count)
        return make_memory({TABLE: WIDTH}, count, "cpu")

    table = CoefficientTable(make, 2)
    names = [f"c{number}" for number in range(300)]
    wrong: list[object] = []
    stop = threading.Event()

    def bulk(version: int) -> None:
        for turn in range(8):
            number = version * 100 + turn
            publish_many(table, names, (block(*[number] * 50) for _ in range(6)), note=number)

    def single() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            table.publish(names[number % 300], {TABLE: np.full(WIDTH, -number, np.float32)}, note=-number)

    def read() -> None:
        while not stop.is_set():
            chosen = names[:40]
            held, missing = table.hold(chosen)
            if not missing:
                part = table.memory.parts[TABLE]
                assert isinstance(part, HostMemory)
                found = part.array[rows_of(chosen, held)]
                notes = np.array([table.note_of(held[name]) for name in chosen], np.float32)
                if (found != notes[:, None]).any():
                    wrong.append(found)
            table.release(held.values())

    others = [threading.Thread(target=target) for target in (single, read, read)]
    bulks = [threading.Thread(target=bulk, args=(version,)) for version in (1, 2)]
    for thread in (*bulks, *others):
        thread.start()
    for thread in bulks:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    assert wrong == [] and table._use.holders == {} and table._use.retired == set()
    assert len(table._free) == table.memory.rows - 1 - 300
    held, _ = table.hold(names)
    assert len(set(table._free) | set(held.values())) == table.memory.rows - 1


def test_rows_are_spread_like_single_ones() -> None:
    layout = TableLayout([3, 8, 9])
    values = np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)
    found = np.zeros((5, layout.width), np.float32)
    packed_module._spread(values, found, layout)
    np.testing.assert_array_equal(found, np.stack([layout.row(row) for row in values]))


def test_the_format_is_pinned(session: SwitchableSession, sample: Path) -> None:
    whole = sample.read_bytes()
    header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    assert list(header) == [
        "__metadata__",
        "coefficients",
        "id_lengths",
        "id_bytes",
        "threshold_rows",
        "thresholds",
    ]
    record = json.loads(header["__metadata__"]["qrlora"])
    assert len(record.pop("content_digest")) == 64
    assert (
        record == metadata_of(session.manifest)
        and record["format"] == "qrlora-packed"
        and record["format_version"] == 3
    )


def test_names_are_listed_while_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of millions takes seconds; the table's lock is free meanwhile, and changes do not reach it."""
    table = new_table(rows=16)
    table.publish("z", {TABLE: np.zeros(WIDTH, np.float32)})
    publish_many(table, ["a", "b", "c"], [block(1, 2, 3)])
    name, listed = IdIndex.name, []

    def looks(index: IdIndex, place: int) -> str:
        assert not table._lock.locked() and not table._writing.locked() and not table._flipping.locked()
        if not listed:
            table.remove("c")
            table.publish("b", {TABLE: np.zeros(WIDTH, np.float32)})
        listed.append(place)
        return name(index, place)

    monkeypatch.setattr(IdIndex, "name", looks)
    assert table.customers() == ["z", "a", "b", "c"]
    assert table.customers() == ["z", "b", "a"]


def test_a_pipe_is_no_packed_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is no plain file"):
        load_packed(None, tmp_path / "pipe")  # type: ignore[arg-type]
