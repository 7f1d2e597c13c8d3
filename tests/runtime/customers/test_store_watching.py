"""A watched folder: what is put there goes live, what is bad is refused, and the watcher survives everything."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import watchfiles

from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.customers.store import CustomerStore, StoreEvent
from tests.runtime.place import INPUTS, Place, until


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
    row = watched.session.table._directory.find("acme")
    watched.path("acme").touch()
    watched.put("acme", 1)
    write_coefficients(replace(watched.version(1), training={"note": "trained again"}), watched.path("acme"))
    watched.put("other", 1)
    watched.logits("other")
    watched.put("other", 2)  # What was told before was looked at before.
    watched.wait("loaded", 3)
    assert [event.customer for event in watched.events] == ["acme", "other", "other"]
    assert watched.session.table._directory.find("acme") == row


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
