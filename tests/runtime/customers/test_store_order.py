"""What a store reads first, what it publishes, and whose session it has."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.formats.customer_files import read_customer
from qrlora_deploy.runtime import load_packed
from qrlora_deploy.runtime.customers import polling
from qrlora_deploy.runtime.customers import store as store_module
from qrlora_deploy.runtime.customers.backlog import Backlog
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from qrlora_deploy.runtime.customers.store import CustomerStore
from qrlora_deploy.tasks.answering import Answering
from tests.runtime.place import DEADLINE_S, Place, until

NAMES = [f"c{number:02d}" for number in range(40)]


def caught_up(store: CustomerStore) -> bool:
    """Whether everything was compared."""
    return store._backlog._later is None and not store._backlog._changed


@pytest.fixture
def packed(place: Place) -> Place:
    """Many customers from a packed file, whose files lie in the folder, too."""
    for number, name in enumerate(NAMES):
        place.put(name, number)
    write_packed(place.folder, place.folder / "all.packed", place.session.manifest)
    assert load_packed(place.session, place.folder / "all.packed") == len(NAMES)
    return place


def test_a_change_comes_before_what_is_only_compared(packed: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    under_way, may_go_on = threading.Event(), threading.Event()

    def held_up(folder: Path, customer: str) -> Coefficients:
        read.append(customer)
        if len(read) == 3:
            under_way.set()
            assert may_go_on.wait(DEADLINE_S)
        return read_customer(folder, customer)

    monkeypatch.setattr(store_module, "read_customer", held_up)
    store = packed.store()
    with store:
        assert under_way.wait(DEADLINE_S)
        changed = next(name for name in NAMES if name not in read)
        packed.put(changed, 99)
        until(lambda: changed in store._backlog._changed)
        may_go_on.set()
        packed.wait("loaded")
        assert read[3] == changed, "the next one, though others wait"
        assert packed.logits(changed) == packed.expected(99)
        until(lambda: caught_up(store))
        assert set(read) == set(NAMES)
    assert [event.customer for event in packed.events] == [changed]


def test_what_is_there_already_is_not_published_again(packed: Place) -> None:
    rows = [packed.session.table._directory.find(name) for name in NAMES]
    packed.session.load("by-hand", packed.version(7))
    packed.put("by-hand", 7)
    store = packed.store()
    with store:
        packed.path("c00").touch()
        packed.put("c01", 1)
        packed.put("c02", 50)
        assert packed.wait("loaded").customer == "c02"
        until(lambda: caught_up(store))
        assert packed.kinds() == ["loaded"] and list(store._read) == ["c02"]
        assert [packed.session.table._directory.find(name) for name in NAMES if name != "c02"] == [
            row for row, name in zip(rows, NAMES, strict=True) if name != "c02"
        ]
        packed.path("c03").unlink()
        assert packed.wait("removed").customer == "c03"


def test_what_was_loaded_by_hand_gives_way_to_the_file(watched: Place) -> None:
    watched.session.load("acme", watched.version(5))
    watched.path("acme").touch()
    watched.wait("loaded", 2)
    assert watched.logits("acme") == watched.expected(1)


def test_a_row_is_told_from_another_by_every_bit_and_by_its_labels(place: Place) -> None:
    session, one = place.session, place.version(1)
    assert not session.holds("acme", one)
    session.load("acme", one)
    assert session.holds("acme", replace(one, values=one.values.copy(), training={"note": "again"}))
    values = one.values.copy()
    values[-1] = np.nextafter(values[-1], np.float32(9))
    assert not session.holds("acme", replace(one, values=values))
    head = {"w": np.ones((2, 32), np.float32), "b": np.zeros(2, np.float32)}
    own = replace(one, head=head, labels=("a", "b"))
    session.load("acme", own)
    assert session.holds("acme", own) and not session.holds("acme", one)
    assert not session.holds("acme", replace(own, labels=("b", "a")))
    assert not session.holds("acme", replace(own, head=head | {"b": np.ones(2, np.float32)}))
    with pytest.raises(InputError, match="on basis eeeeeeeeeeee"):
        session.holds("acme", replace(own, basis_digest="e" * 64))


def test_labels_are_kept_once(place: Place, tmp_path: Path) -> None:
    notes = place.session.table._use._notes
    place.put("acme", 1)
    place.session.load("acme", place.path("acme"))
    assert notes.popitem()[1].answering is place.session.versions.base.answering
    head = {"w": np.ones((2, 32), np.float32), "b": np.zeros(2, np.float32)}
    own = replace(place.version(1), head=head, labels=("a", "b"))
    for name in ("x", "y"):
        write_coefficients(own, tmp_path / name)
        place.session.load(name, tmp_path / name)
    first, second = notes.values()
    assert first.answering == Answering(("a", "b")) and first.answering is second.answering
    assert first.digest == second.digest == own.digest
    # Customers of the base's labels are noted where they decide otherwise; they share that too.
    for name in ("x", "y"):
        place.session.load(name, replace(place.version(1), thresholds=(0.25, 0.5, 0.5, 0.75)))
    first, second = notes.values()
    assert first.answering.thresholds == (0.25, 0.5, 0.5, 0.75) and first.answering is second.answering


def test_a_session_has_one_store(place: Place) -> None:
    place.put("acme", 1)
    store = place.store()
    with pytest.raises(InputError, match="has a store or a `fetch` already"):
        place.store()
    store.start()
    place.logits("acme")
    store.close()
    store.close()
    assert place.session.fetch is None
    other = place.store()
    with pytest.raises(InputError, match="has a store or a `fetch` already"):
        store.start()
    other.close()
    place.put("acme", 2)
    with store:
        place.wait("loaded", 2)
        assert place.logits("acme") == place.expected(2)
    with pytest.raises(InputError, match="load it first"):
        place.logits("nobody")


def backlog(look: Callable[[str], None], compare: Callable[[str], None], complaints: list[str]) -> Backlog:
    return Backlog(look, compare, lambda: [], complaints.append)


def test_a_backlog_takes_the_newest_first_and_survives_a_list_that_ends_early() -> None:
    done: list[str] = []
    complaints: list[str] = []
    begun, may_go_on, finished = threading.Event(), threading.Event(), threading.Event()

    def look(name: str) -> None:
        if name == "first":
            begun.set()
            assert may_go_on.wait(DEADLINE_S)
        done.append(name)

    def compare(name: str) -> None:
        done.append(f"={name}")
        if name == "last":
            finished.set()

    def listed() -> Iterator[str]:
        yield ""
        yield "x"
        raise InputError("the folder went away")

    waiting = backlog(look, compare, complaints)
    waiting.start()
    waiting.add(["first"])
    assert begun.wait(DEADLINE_S)
    waiting.compare_later(listed())
    waiting.add(["a", "b"])
    waiting.add(["due", "a"], first=False)
    waiting.add(["a"])
    may_go_on.set()
    until(lambda: bool(complaints), done)
    waiting.compare_later(iter(["last"]))
    assert finished.wait(DEADLINE_S)
    waiting.close()
    assert done == ["first", "a", "b", "due", "=x", "=last"] and complaints == ["the folder went away"]


def test_a_name_that_changed_comes_before_a_list_that_takes_long() -> None:
    done, finished = list[str](), threading.Event()

    def listed() -> Iterator[str]:
        waiting.add(["a"])
        yield ""
        yield "last"

    def compare(name: str) -> None:
        done.append(f"={name}")
        finished.set()

    waiting = backlog(done.append, compare, [])
    waiting.start()
    waiting.compare_later(listed())
    assert finished.wait(DEADLINE_S)
    waiting.close()
    assert done == ["a", "=last"]


def test_entries_that_came_last_are_named_first(tmp_path: Path) -> None:
    for number in range(polling.NEWEST + 44):
        path = tmp_path / f"{number:03}.safetensors"
        path.touch()
        os.utime(path, ns=(number, number))
    # Each was changed in this order too, whatever its time of writing says.
    renamed = tmp_path / "000.safetensors"
    renamed.rename(tmp_path / "back.safetensors")
    (tmp_path / "nowhere.safetensors").symlink_to("absent")
    found = list(filter(None, polling.newest_first(tmp_path)))
    assert sorted(found) == sorted(path.name for path in tmp_path.iterdir())
    assert found[0] == "back.safetensors" and found[1] == f"{polling.NEWEST + 43:03}.safetensors"
    assert "nowhere.safetensors" in found[polling.NEWEST :]
