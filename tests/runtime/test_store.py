"""Customers in a folder: fetched, changed, refused, deleted and pushed out, while others write and read."""

import json
import os
import shutil
import string
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import watchfiles
from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.coefficients import Coefficients, write_coefficients
from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.files import atomic_file
from qrlora_deploy.runtime import store as store_module
from qrlora_deploy.runtime.bundle import open_bundle
from qrlora_deploy.runtime.customer_files import customer_ids, read_customer
from qrlora_deploy.runtime.store import CustomerStore, StoreEvent, check_customer_id
from qrlora_deploy.runtime.switchable import SwitchableSession

DEADLINE_S = 10.0
INPUTS = {
    "input_ids": np.array([[2, 40, 50, 60, 3]], dtype=np.int64),
    "attention_mask": np.ones((1, 5), dtype=np.int64),
    "token_type_ids": np.zeros((1, 5), dtype=np.int64),
}


class Place:
    """A folder of customers, a session, and the events of a store."""

    def __init__(self, folder: Path, bundle: Path, customer: Coefficients) -> None:
        self.folder, self.bundle, self.customer = folder, bundle, customer
        folder.mkdir()
        self.session = self.open()
        self.events: list[StoreEvent] = []

    def open(self, **options: object) -> SwitchableSession:
        return SwitchableSession(open_bundle(self.bundle), threads=1, **options)  # type: ignore[arg-type]

    def version(self, number: float) -> Coefficients:
        return replace(self.customer, values=self.customer.values * np.float32(number))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def put(self, name: str, number: float) -> None:
        write_coefficients(self.version(number), self.path(name))

    def store(self, **options: bool) -> CustomerStore:
        return CustomerStore(self.session, self.folder, self.events.append, **options)

    def logits(self, name: str | None, session: SwitchableSession | None = None) -> list[float]:
        found: list[float] = (session or self.session).predict(INPUTS, [name])[0][0].tolist()
        return found

    def expected(self, number: float) -> list[float]:
        other = self.open()
        other.load("it", self.version(number))
        return self.logits("it", other)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def wait(self, kind: str, count: int = 1) -> StoreEvent:
        until(lambda: self.kinds().count(kind) >= count, self.events)
        return [event for event in self.events if event.kind == kind][count - 1]


def until(condition: Callable[[], bool], shown: object = None) -> None:
    """Wait for something that the watcher does."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, shown
        time.sleep(0.01)


@pytest.fixture
def place(tmp_path: Path, switchable: Path, tiny_customer: Coefficients) -> Place:
    return Place(tmp_path / "customers", switchable, tiny_customer)


@pytest.fixture
def watched(place: Place) -> Iterator[Place]:
    """With a customer acme that is in the table and watched."""
    place.put("acme", 1)
    with place.store():
        place.logits("acme")
        place.wait("loaded")
        yield place


ALLOWED = string.ascii_letters + string.digits + "._-"
HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    ".hidden",
    "x" * 129,
    "é",
    "a b",
    "a\n",
    "\ud800",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_ids_are_refused_everywhere(place: Place, name: str) -> None:
    store = place.store()
    for call in (check_customer_id, store.fetch, lambda it: read_customer(place.folder, it), place.logits):
        with pytest.raises(InputError, match="is no customer id") as caught:
            call(name)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    assert place.events == []


@given(st.text() | st.text(ALLOWED, max_size=140))
def test_an_id_is_accepted_just_when_it_is_plain(name: str) -> None:
    plain = 1 <= len(name) <= 128 and set(name) <= set(ALLOWED) and name[0] != "."
    try:
        check_customer_id(name)
    except InputError:
        assert not plain
    else:
        assert plain and Path("folder", f"{name}.safetensors").parent == Path("folder")


def test_other_files_are_passed_over(place: Place) -> None:
    for name in (
        ".acme.safetensors.12.tmp",
        "acme.safetensors.tmp",
        ".safetensors",
        ".x.safetensors",
        "note.txt",
        "a b",
    ):
        (place.folder / name).write_bytes(b"")
    place.put("b.c", 1)
    place.put("a", 1)
    assert place.store().customers() == ["a", "b.c"]
    with pytest.raises(InputError, match="nowhere: no such folder"):
        CustomerStore(place.session, place.folder / "nowhere")
    with pytest.raises(InputError, match="cannot be read"):
        list(customer_ids(place.folder / "nowhere"))


def test_a_customer_is_fetched_when_it_is_asked_for(place: Place) -> None:
    place.put("acme", 1)
    place.store()
    assert place.session.customers() == []
    assert place.logits("acme") == place.expected(1)
    (event,) = place.events
    assert (event.kind, event.customer, event.digest) == ("loaded", "acme", place.customer.digest)
    with pytest.raises(InputError, match=r"customers holds no customer 'nobody'.*nobody\.safetensors"):
        place.logits("nobody")
    assert place.kinds() == ["loaded"], "a wrong name is the request's affair"


def test_links_stay_within_the_folder(place: Place, tmp_path: Path) -> None:
    place.store()
    write_coefficients(place.customer, tmp_path / "outside.safetensors")
    place.path("out").symlink_to(tmp_path / "outside.safetensors")
    place.path("round").symlink_to(place.path("round"))
    place.path("dangling").symlink_to(place.folder / "nothing")
    os.mkfifo(place.path("pipe"))
    for name, message in (("out", "leads out"), ("round", "round"), ("dangling", "dangling"), ("pipe", "no file")):
        with pytest.raises(InputError, match=message):
            place.logits(name)
    place.put("acme", 1)
    place.path("inside").symlink_to("acme.safetensors")
    assert place.logits("inside") == place.expected(1)


def test_a_swapped_folder_of_versions_goes_live(place: Place) -> None:
    """The way that configuration is mounted into containers."""
    for number in (1, 2):
        (place.folder / f"..v{number}").mkdir()
        write_coefficients(place.version(number), place.folder / f"..v{number}" / "acme.safetensors")
    (place.folder / "..data").symlink_to("..v1")
    place.path("acme").symlink_to("..data/acme.safetensors")
    with place.store():
        assert place.logits("acme") == place.expected(1)
        (place.folder / "..new").symlink_to("..v2")
        (place.folder / "..new").replace(place.folder / "..data")
        place.wait("loaded", 2)
        assert place.logits("acme") == place.expected(2)


def test_systems_without_files_in_memory(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put("acme", 1)
    place.path("bad").write_bytes(b"")
    messages = []
    for _ in range(2):
        assert read_customer(place.folder, "acme").digest == place.customer.digest
        with pytest.raises(InputError) as caught:
            read_customer(place.folder, "bad")
        messages.append(str(caught.value))
        monkeypatch.delattr("os.memfd_create", raising=False)
    assert messages[0] == messages[1] and messages[0].startswith(f"{place.path('bad')} is not a complete")


@pytest.mark.parametrize("poll", [False, True])
def test_a_replaced_file_goes_live(place: Place, poll: bool) -> None:
    place.put("acme", 1)
    with place.store(poll=poll):
        assert place.logits("acme") == place.expected(1)
        # The second one within the same second, which polling alone does not tell from the first.
        for number in (2, 3):
            place.put("acme", number)
            event = place.wait("loaded", number)
            assert event.digest == place.version(number).digest
            assert place.logits("acme") == place.expected(number)
    assert place.kinds() == ["loaded"] * 3


def test_the_same_content_is_not_published_again(watched: Place) -> None:
    row = watched.session.table._row_of["acme"]
    watched.path("acme").touch()
    watched.put("acme", 1)
    write_coefficients(replace(watched.version(1), training={"note": "trained again"}), watched.path("acme"))
    watched.put("other", 1)
    watched.logits("other")
    watched.put("other", 2)  # What was told before was looked at before.
    watched.wait("loaded", 3)
    assert [event.customer for event in watched.events] == ["acme", "other", "other"]
    assert watched.session.table._row_of["acme"] == row


def test_other_labels_are_another_version(watched: Place) -> None:
    head = {"w": np.ones((2, 32), np.float32), "b": np.zeros(2, np.float32)}
    one = replace(watched.customer, head=head, labels=("a", "b"))
    write_coefficients(one, watched.path("acme"))
    watched.wait("loaded", 2)
    write_coefficients(replace(one, labels=("b", "a")), watched.path("acme"))
    watched.wait("loaded", 3)
    assert watched.session.predict(INPUTS, ["acme"])[1] == [("b", "a")]


def with_nan(path: Path, customer: Coefficients) -> None:
    whole = bytearray(path.read_bytes())
    whole[-4:] = np.array([np.nan], np.float32).tobytes()
    path.write_bytes(whole)


BAD: dict[str, tuple[Callable[[Path, Coefficients], object], str]] = {
    "cut": (lambda path, _: path.write_bytes(path.read_bytes()[:-3]), "not a complete safetensors file"),
    "empty": (lambda path, _: path.write_bytes(b""), "not a complete"),
    "changed": (with_nan, "was changed"),
    "basis": (lambda path, it: write_coefficients(replace(it, basis_digest="e" * 64), path), "on basis eeeeeeeeeeee"),
    "base": (lambda path, it: write_coefficients(replace(it, base_digest="e" * 64), path), "on base eeeeeeeeeeee"),
    "task": (lambda path, it: write_coefficients(replace(it, task="text-regression"), path), "is a text-regression"),
    "labels": (lambda path, it: write_coefficients(replace(it, labels=("x",)), path), "other labels"),
    "length": (lambda path, it: write_coefficients(replace(it, values=it.values[1:]), path), "coefficients, not"),
    "folder": (lambda path, _: (path.unlink(), path.mkdir()), "no file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_and_the_old_version_serves(watched: Place, case: str) -> None:
    before = watched.logits("acme")
    damage, message = BAD[case]
    damage(watched.path("acme"), watched.customer)
    # A damaged file may be seen half written before: the last word counts.
    until(lambda: watched.events[-1].kind == "refused" and message in watched.events[-1].message, watched.events)
    event = watched.events[-1]
    assert event.customer == "acme" and event.digest == "" and event.message.isprintable()
    assert "/proc" not in event.message, "the name of a private copy"
    assert watched.logits("acme") == before
    if case == "folder":
        watched.path("acme").rmdir()
    else:
        watched.put("acme", 2)
        watched.wait("loaded", 2)
        assert watched.logits("acme") == watched.expected(2)


def test_a_customer_that_was_refused_works_once_its_file_is_good(watched: Place) -> None:
    whole = watched.path("acme").read_bytes()
    watched.path("new").write_bytes(whole[:-1])
    with pytest.raises(InputError, match="new.safetensors is not a complete"):
        watched.logits("new")
    watched.wait("refused")
    watched.put("new", 3)
    until(lambda: "new" in watched.session.customers(), watched.events)
    assert watched.logits("new") == watched.expected(3)


def test_a_new_file_is_only_made_known(watched: Place) -> None:
    watched.put("new", 2)
    watched.put("acme", 2)
    watched.wait("loaded", 2)
    assert watched.session.customers() == ["acme"]
    assert watched.logits("new") == watched.expected(2)


def test_a_file_that_is_written_in_place_goes_live_when_it_is_whole(watched: Place, tmp_path: Path) -> None:
    write_coefficients(watched.version(2), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    before = watched.logits("acme")
    with watched.path("acme").open("wb") as file:
        file.write(whole[: len(whole) // 2])
        file.flush()
        watched.wait("refused")
        assert watched.logits("acme") == before
        file.write(whole[len(whole) // 2 :])
    watched.wait("loaded", 2)
    assert watched.logits("acme") == watched.expected(2)


def test_a_deleted_file_is_unloaded(watched: Place) -> None:
    watched.path("acme").unlink()
    assert watched.wait("removed").customer == "acme"
    assert watched.session.customers() == []
    with pytest.raises(InputError, match="holds no customer"):
        watched.logits("acme")
    watched.put("acme", 2)
    assert watched.logits("acme") == watched.expected(2)


def test_a_folder_that_goes_away_is_reported_and_may_come_back(watched: Place) -> None:
    before = watched.logits("acme")
    shutil.rmtree(watched.folder)
    event = watched.wait("failed")
    assert event.customer == "" and str(watched.folder) in event.message and "goes on being served" in event.message
    assert watched.logits("acme") == before
    watched.folder.mkdir()
    assert "is empty" in watched.wait("failed", 2).message
    assert watched.logits("acme") == before
    watched.put("acme", 2)
    watched.wait("loaded", 2)
    assert watched.logits("acme") == watched.expected(2)
    assert "removed" not in watched.kinds()


def test_what_changed_before_the_start_is_found(place: Place) -> None:
    for name in ("same", "changed", "deleted", "by"):
        place.put(name, 1)
    store = place.store()
    for name in ("same", "changed", "deleted"):
        place.logits(name)
    place.session.load("by", place.version(1))
    place.session.load("fileless", place.version(1))
    place.put("changed", 2)
    place.put("by", 3)
    place.path("deleted").unlink()
    place.events.clear()
    with store:
        place.wait("loaded", 2)
        place.wait("removed")
        assert place.logits("changed") == place.expected(2) and place.logits("by") == place.expected(3)
    assert sorted(event.customer for event in place.events) == ["by", "changed", "deleted"]
    assert sorted(place.session.customers()) == ["by", "changed", "fileless", "same"]
    store.close()
    store.start()
    store.start()
    place.put("same", 2)
    place.wait("loaded", 3)
    store.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "folder-watcher"]


def test_the_last_customer_that_was_deleted_before_the_start_is_unloaded(place: Place) -> None:
    place.put("acme", 1)
    store = place.store()
    place.logits("acme")
    place.path("acme").unlink()
    with store:
        place.wait("removed")
    assert place.session.customers() == []


def test_the_watcher_survives_everything(watched: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    load, wrong = watched.session.load, [MemoryError("much"), QrloraError("the GPU is gone")]

    def fails(customer: str, source: Coefficients) -> None:
        if wrong:
            raise wrong.pop()
        load(customer, source)

    monkeypatch.setattr(watched.session, "load", fails)
    watched.put("acme", 2)
    # No further change of the file is needed.
    watched.wait("loaded", 2)
    assert [event.message for event in watched.events if event.kind == "failed"] == [
        "the GPU is gone",
        "MemoryError: much",
    ]
    watch, calls = watchfiles.watch, []

    def broken(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("out of watches")
        return watch(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(watchfiles, "watch", broken)
    watched.folder.rename(watched.folder.with_name("aside"))
    watched.wait("failed", 3)
    watched.folder.with_name("aside").rename(watched.folder)
    assert "out of watches" in watched.wait("failed", 4).message
    watched.put("acme", 3)
    watched.wait("loaded", 3)
    assert watched.kinds().count("failed") == 4, "the same complaint is made once"


def test_a_report_that_fails_harms_nobody(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    def report(event: StoreEvent) -> None:
        raise RuntimeError("nobody listens")

    place.put("acme", 1)
    with CustomerStore(place.session, place.folder, report):
        assert place.logits("acme") == place.expected(1)
        place.put("acme", 2)
        until(lambda: len(caplog.records) >= 2)
        assert place.logits("acme") == place.expected(2)


def test_without_a_report_events_are_logged(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.path("acme").write_bytes(b"")
    CustomerStore(place.session, place.folder)
    with pytest.raises(InputError):
        place.logits("acme")
    assert "refused acme" in caplog.text


def test_two_requests_read_a_customer_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put("acme", 1)
    place.store()
    reads, barrier = [], threading.Barrier(4)

    def slow(folder: Path, customer: str) -> Coefficients:
        reads.append(customer)
        time.sleep(0.05)
        return read_customer(folder, customer)

    def ask(_: int) -> list[float]:
        barrier.wait()
        return place.logits("acme")

    monkeypatch.setattr(store_module, "read_customer", slow)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    assert reads == ["acme"] and place.kinds() == ["loaded"]
    assert answers == [place.expected(1)] * 4


def test_an_older_file_never_wins(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has read the old file when the new one comes; the watcher must have the last word."""
    place.put("acme", 1)
    has_read, may_go_on = threading.Event(), threading.Event()

    def held_up(folder: Path, customer: str) -> Coefficients:
        found = read_customer(folder, customer)
        if not has_read.is_set():
            has_read.set()
            assert may_go_on.wait(DEADLINE_S)
        return found

    monkeypatch.setattr(store_module, "read_customer", held_up)
    with place.store(), ThreadPoolExecutor(1) as pool:
        request = pool.submit(place.logits, "acme")
        assert has_read.wait(DEADLINE_S)
        place.put("acme", 2)
        time.sleep(0.4)  # The watcher comes to the lock; where it does not, the test proves less.
        may_go_on.set()
        assert request.result() == place.expected(1)
        until(lambda: place.logits("acme") == place.expected(2), place.events)
        assert [event.digest for event in place.events] == [place.version(number).digest for number in (1, 2)]


def test_more_customers_than_rows_under_threads(place: Place) -> None:
    names = [f"c{number}" for number in range(30)]
    whole = place.open()
    for number, name in enumerate(names):
        place.put(name, 0.1 * number)
        whole.load(name, place.version(0.1 * number))
    place.session = place.open(rows=14, max_rows=14)
    place.store()
    inputs = {name: np.repeat(array, 3, axis=0) for name, array in INPUTS.items()}

    def ask(seed: int) -> int:
        random = np.random.default_rng(seed)
        for _ in range(40):
            chosen = [names[index] for index in random.integers(len(names), size=3)]
            np.testing.assert_array_equal(place.session.predict(inputs, chosen)[0], whole.predict(inputs, chosen)[0])
        return 1

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(ask, range(4))) == 4
    assert len(place.session.customers()) == 13 and len(place.events) > 60


def test_a_full_table_is_tried_again(place: Place) -> None:
    place.session = place.open(rows=2, max_rows=2)
    place.put("acme", 1)
    with place.store():
        place.logits("acme")
        held, _ = place.session.table.hold(["acme"])
        place.put("acme", 2)
        assert "in use" in place.wait("failed").message
        place.session.table.release(held.values())
        place.wait("loaded", 2)
        assert place.logits("acme") == place.expected(2)


def test_a_program_ends_while_a_store_watches(place: Place) -> None:
    import subprocess
    import sys

    code = """
import json, sys
from pathlib import Path
from qrlora_deploy.runtime.bundle import open_bundle
from qrlora_deploy.runtime.store import CustomerStore
from qrlora_deploy.runtime.switchable import SwitchableSession
store = CustomerStore(SwitchableSession(open_bundle(Path(sys.argv[1]))), Path(sys.argv[2]))
store.start()
print(json.dumps(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(place.bundle), str(place.folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout) == []


def test_the_temporary_files_of_this_project_are_no_customers(place: Place) -> None:
    with atomic_file(place.path("acme")) as temporary:
        temporary.write_bytes(b"half")
        assert list(customer_ids(place.folder)) == []
