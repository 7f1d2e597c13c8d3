"""Packed customers: round trip, thresholds, and what loading replaces."""

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.row_layout import TABLE
from qrlora_deploy.runtime.customers import packed_header
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.customers.packed_check import check_packed
from qrlora_deploy.runtime.customers.packed_header import metadata_of
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.runtime.table.memory import HostMemory
from qrlora_deploy.runtime.table.table import rows_of
from qrlora_deploy.tasks.answering import Answering
from tests.runtime.customers.packing import SAME_FOLDER, THRESHOLDS, empty, scaled
from tests.runtime.customers.test_store import ALLOWED
from tests.runtime.place import INPUTS

IDS = st.text(ALLOWED, min_size=1, max_size=128).filter(lambda name: name[0] != ".")


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


def test_a_pipe_is_no_packed_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is no plain file"):
        load_packed(None, tmp_path / "pipe")  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", ["F32", "F16"])
def test_an_answer_has_the_digest_of_the_customers_own_file(
    tmp_path: Path, fresh: SwitchableSession, tiny_customer: Coefficients, stored: str
) -> None:
    # Of 2**-10 steps, which fp16 holds exactly, so that both kinds of packed file hold what the customers' own do.
    exact = replace(tiny_customer, values=(np.round(tiny_customer.values * 1024) / 1024).astype(np.float32))
    customers = {"plain": exact, "tuned": replace(scaled(exact, -0.5), thresholds=THRESHOLDS)}
    path = tmp_path / "packed.safetensors"
    write_packed(customers.items(), path, fresh.manifest, dtype={"F32": "fp32", "F16": "fp16"}[stored])
    load_packed(fresh, path)
    inputs = {name: np.repeat(array, 3, axis=0) for name, array in INPUTS.items()}
    names = ["tuned", None, "plain"]
    for _ in range(2):
        versions = fresh.answer(inputs, names)[1]
        assert [it.digest for it in versions] == [customers["tuned"].digest, "", customers["plain"].digest]
        assert versions[0].answering == Answering(fresh.manifest.labels, THRESHOLDS)
    assert customers["plain"].digest != customers["tuned"].digest
    assert fresh.holds("plain", customers["plain"]) and fresh.holds("tuned", customers["tuned"])
    # Loaded anew, the customer has the digest of what it is then.
    write_packed([("plain", scaled(exact, 2))], path, fresh.manifest)
    load_packed(fresh, path)
    assert fresh.answer(inputs, names)[1][2].digest == scaled(exact, 2).digest
