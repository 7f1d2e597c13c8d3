"""Customers in a folder: fetched when they are asked for and pushed out, while others write and read."""

import json
import os
import string
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.formats.customer_files import customer_ids, read_customer
from qrlora_deploy.io.files import atomic_file
from qrlora_deploy.runtime.customers import store as store_module
from qrlora_deploy.runtime.customers.events import StoreEvent, event_of
from qrlora_deploy.runtime.customers.store import CustomerStore, check_customer_id
from tests.runtime.place import DEADLINE_S, INPUTS, Place, until

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
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.customers.store import CustomerStore
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
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


def test_whatever_went_wrong_is_told_in_one_short_line() -> None:
    event = event_of("acme", OSError("a" * 50_000 + "\nmore"))
    assert event.kind == "failed" and event.message.startswith("OSError: aaa")
    assert len(event.message) < 500 and event.message.isprintable()
    assert event_of("acme", InputError("acme.safetensors is cut")) == StoreEvent(
        "refused", "acme", "acme.safetensors is cut"
    )
