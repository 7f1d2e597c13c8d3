"""Customers in an object store: read when asked for, checked, changed, deleted, and served while it is down."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.errors import (
    BasisMismatchError,
    FileFormatError,
    InputError,
    MalformedInputError,
    NotReadyError,
    UnknownCustomerError,
)
from qrlora_deploy.formats.customer_files import MAX_SENT_BYTES
from qrlora_deploy.runtime.customers.objects import patience
from qrlora_deploy.runtime.customers.objects.bucket import Bucket, mark_of
from qrlora_deploy.runtime.customers.objects.names import Names, hashes_of
from qrlora_deploy.runtime.customers.objects.store import ObjectStore
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from tests.runtime.customers.objects.place import ObjectPlace, content_of
from tests.runtime.place import until


class Broken:
    """A file system whose questions fail from some time on, and are counted by their names."""

    def __init__(self, files: Any) -> None:
        self._files, self.error, self.asked = files, None, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._files, name)
        if name not in ("ls", "info", "cat_file"):
            return method

        def ask(*arguments: Any, **options: Any) -> Any:
            self.asked.append(name)
            if self.error is not None:
                raise self.error
            return method(*arguments, **options)

        return ask


def watched(store: ObjectStore) -> Broken:
    broken = Broken(store.bucket._files)
    store.bucket._files = broken
    return broken


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSE_S", 0.001)


def test_a_customer_is_read_when_it_is_asked_for(objects: ObjectPlace) -> None:
    objects.put("acme", 1)
    objects.put("beta", -0.5)
    store = objects.store()
    asked = watched(store).asked
    assert not objects.session.customers() and store.stats().customers == 2
    assert objects.logits("acme") == objects.expected(1)
    assert objects.logits("beta") == objects.expected(-0.5) != objects.expected(1)
    assert asked.count("cat_file") == 2
    assert [(event.kind, event.customer) for event in objects.events] == [("loaded", "acme"), ("loaded", "beta")]
    assert objects.events[0].digest == objects.version(1).digest
    assert objects.events[0].message == f"{objects.url}/acme.safetensors is live"


def test_what_changes_is_live_after_the_next_listing(objects: ObjectPlace) -> None:
    objects.put("acme", 1)
    objects.put("beta", 2)
    store = objects.store()
    for name in ("acme", "beta"):
        objects.logits(name)
    asked = watched(store).asked
    store.look()
    assert asked == ["ls"], "nothing has changed, so nothing is read"
    objects.put("acme", 3)
    objects.remove("beta")
    objects.put("new", 4)
    with pytest.raises(UnknownCustomerError, match="held no customer 'new' when it was listed last"):
        objects.logits("new")
    assert objects.logits("beta") == objects.expected(2)
    store.look()
    assert objects.logits("acme") == objects.expected(3) and objects.logits("new") == objects.expected(4)
    with pytest.raises(UnknownCustomerError):
        objects.logits("beta")
    assert sorted(objects.kinds()) == [*["loaded"] * 4, "removed"]


def test_the_place_is_listed_again_and_again(objects: ObjectPlace) -> None:
    objects.put("acme", 1)
    objects.store(poll_s=0.02)
    objects.logits("acme")
    objects.put("acme", 2)
    until(lambda: objects.logits("acme") == objects.expected(2), objects.events)
    objects.remove("acme")
    objects.put("other", 1)
    until(lambda: "removed" in objects.kinds(), objects.events)


def test_unknown_names_and_hostile_ones_ask_the_store_nothing(objects: ObjectPlace) -> None:
    objects.put("acme", 1)
    objects.files.pipe_file(f"{objects.root}/../secret.safetensors", content_of(objects.version(1)))
    store = objects.store()
    asked = watched(store).asked
    for name in ("nobody", "acme2"):
        with pytest.raises(UnknownCustomerError):
            store.fetch(name)
    for name in ("../secret", "a/b", ".acme", "", "acme\n", "acme?versionId=1", "a" * 129, "s3://other/acme", "*"):
        with pytest.raises(MalformedInputError, match="is no customer id"):
            store.fetch(name)
        with pytest.raises(MalformedInputError, match="is no customer id"):
            store.bucket.read(name)
    assert not asked and not objects.events


def test_the_same_checks_as_of_a_file(objects: ObjectPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = content_of(objects.version(1))
    strange = replace(objects.customer, base_digest="0" * 64)
    wide = replace(objects.customer, values=np.ones(3, np.float32))
    cases: dict[str, tuple[bytes, type[InputError], str]] = {
        "empty": (b"", FileFormatError, "empty.safetensors"),
        "cut": (whole[:-1], FileFormatError, "cut.safetensors"),
        "changed": (whole[:-1] + bytes([whole[-1] ^ 1]), FileFormatError, "was changed"),
        "pickle": (b"\x80\x04}.", FileFormatError, "pickle.safetensors"),
        "stranger": (content_of(strange), BasisMismatchError, "base"),
        "wide": (content_of(wide), InputError, "coefficients"),
    }
    for name, (content, _, _) in cases.items():
        objects.write(name, content)
    # Written as nobody's exporter would: the format has no way to say NaN by itself.
    nan = bytearray(whole)
    nan[-4:] = np.float32("nan").tobytes()
    objects.write("nan", bytes(nan))
    store = objects.store()
    asked = watched(store).asked
    for name, (_, error, message) in {**cases, "nan": (b"", FileFormatError, "nan.safetensors")}.items():
        for _ in range(3):
            with pytest.raises(error, match=message):
                objects.logits(name)
    assert asked.count("info") == len(cases) + 1, "what cannot be served is not read for every request"
    assert objects.kinds() == ["refused"] * (len(cases) + 1)
    objects.put("cut", 2)
    store.look()
    assert objects.logits("cut") == objects.expected(2)


def test_an_object_that_is_too_large_is_not_read(objects: ObjectPlace) -> None:
    objects.write("large", bytes(MAX_SENT_BYTES + 1))
    store = objects.store()
    asked = watched(store).asked
    with pytest.raises(InputError, match=f"has {MAX_SENT_BYTES + 1} bytes; a customer has {MAX_SENT_BYTES} at most"):
        objects.logits("large")
    assert asked == ["info"]


def test_an_object_that_grows_meanwhile_is_read_again(objects: ObjectPlace) -> None:
    objects.write("acme", b"short")
    store = objects.store()
    files = store.bucket._files

    class Changing(Broken):
        def __getattr__(self, name: str) -> Any:
            if name == "cat_file" and not self.asked.count("cat_file"):
                objects.put("acme", 2)
            return super().__getattr__(name)

    store.bucket._files = Changing(files)
    assert objects.logits("acme") == objects.expected(2)
    assert store.stats().failures == 1 and store.stats().up


def test_a_changed_object_that_cannot_be_served_changes_nothing(objects: ObjectPlace) -> None:
    objects.put("acme", 1)
    store = objects.store()
    before = objects.logits("acme")
    objects.write("acme", b"no customer")
    asked = watched(store).asked
    for _ in range(3):
        store.look()
    assert objects.logits("acme") == before
    assert objects.kinds() == ["loaded", "refused"] and asked.count("cat_file") == 1
    objects.put("acme", 2)
    store.look()
    assert objects.logits("acme") == objects.expected(2)


@pytest.mark.parametrize("error", [OSError("reset"), PermissionError("forbidden"), TimeoutError(), RuntimeError("x")])
def test_a_store_that_is_down_takes_nobody_away(objects: ObjectPlace, error: Exception) -> None:
    objects.put("acme", 1)
    objects.put("cold", 2)
    store = objects.store()
    before = objects.logits("acme")
    broken = watched(store)
    broken.error = error
    with pytest.raises(NotReadyError, match="does not answer"):
        store.look()
    assert not store.stats().up and store.stats().failures and store.stats().customers == 2
    asked = len(broken.asked)
    for _ in range(20):
        with pytest.raises(NotReadyError, match="does not answer"):
            objects.logits("cold")
    for name in ("new", "nobody"):
        # Of who came since the last listing nothing is known.
        with pytest.raises(NotReadyError, match="does not answer"):
            objects.logits(name)
    assert len(broken.asked) == asked, "it rests after it has failed"
    assert objects.logits("acme") == before
    broken.error = None
    store.look()
    assert store.stats().up
    with pytest.raises(UnknownCustomerError):
        objects.logits("nobody")
    assert objects.logits("cold") == objects.expected(2)


def test_one_object_that_cannot_be_read_says_nothing_of_the_others(objects: ObjectPlace) -> None:
    for number, name in enumerate(("denied", "fine", "b", "c", "last")):
        objects.put(name, number)
    store = objects.store()
    files, denied = store.bucket._files, {"denied"}

    class Denying(Broken):
        def __getattr__(self, name: str) -> Any:
            method = super().__getattr__(name)

            def ask(path: str, *arguments: Any, **options: Any) -> Any:
                if any(path.endswith(f"/{customer}.safetensors") for customer in denied):
                    raise PermissionError("forbidden: secret-endpoint")
                return method(path, *arguments, **options)

            return ask

    store.bucket._files = Denying(files)
    for _ in range(5):
        with pytest.raises(NotReadyError, match="^the store of this customer does not answer; try again soon$"):
            objects.logits("denied")
    assert store.stats().up and objects.logits("fine") == objects.expected(1)
    assert objects.kinds() == ["failed", "loaded"] and "secret-endpoint" in objects.events[0].message
    denied |= {"b", "c"}
    for name in ("denied", "b", "c", "last"):
        with pytest.raises(NotReadyError):
            objects.logits(name)
    assert not store.stats().up, "three in a row are too many"
    store.look()
    assert store.stats().up and objects.logits("last") == objects.expected(4)


def test_a_moment_s_failure_is_passed_over(objects: ObjectPlace) -> None:
    objects.put("acme", 1)
    store = objects.store()
    broken = watched(store)
    failures: list[Exception] = [OSError("a"), OSError("b")]

    def cat_file(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return broken._files.cat_file(*arguments, **options)

    broken.cat_file = cat_file  # type: ignore[attr-defined]
    assert objects.logits("acme") == objects.expected(1)
    assert not failures and store.stats().failures == 2 and store.stats().up


def test_the_same_complaint_is_made_once_and_nobody_goes_with_an_empty_place(objects: ObjectPlace) -> None:
    objects.put("acme", 1)
    store = objects.store(poll_s=0.01)
    before = objects.logits("acme")
    objects.files.pipe_file(f"{objects.root}/README.md", b"still a folder")
    objects.remove("acme")
    until(lambda: "failed" in objects.kinds(), objects.events)
    listed = watched(store).asked
    until(lambda: len(listed) > 5)
    assert objects.kinds() == ["loaded", "failed"] and objects.logits("acme") == before
    assert objects.events[-1].message == f"{objects.url} is empty; what is loaded goes on being served"


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("left", ["nothing", "another file", "a customer"])
def test_unknown_is_said_only_where_the_store_says_so(objects: ObjectPlace, loaded: bool, left: str) -> None:
    for number, name in enumerate(("acme", "cold", "last"), 1):
        objects.put(name, number)
    store = objects.store()
    before = objects.logits("acme") if loaded else []
    objects.files.rm(objects.root, recursive=True)
    if left != "nothing":
        objects.files.makedirs(objects.root, exist_ok=True)
    if left == "another file":
        objects.files.pipe_file(f"{objects.root}/README.md", b"still a folder")
    elif left == "a customer":
        objects.put("last", 3)
    kind = UnknownCustomerError if left == "a customer" else NotReadyError
    for _ in range(3):
        with pytest.raises(kind):
            objects.logits("cold")
    if left != "a customer":
        assert not store.stats().up and objects.kinds()[-1] == "failed" and objects.kinds().count("failed") == 1
        with pytest.raises(InputError, match=r"is empty|no such place"):
            store.look()
        assert store.stats().customers == 3
        objects.files.makedirs(objects.root, exist_ok=True)
        for name in ("acme", "cold", "last"):
            objects.put(name, 4)
        store.look()
        assert store.stats().up and objects.logits("cold") == objects.expected(4)
    elif loaded:
        assert objects.logits("acme") == before


def test_one_read_for_many_who_ask_at_once(objects: ObjectPlace) -> None:
    objects.put("acme", 1)
    store = objects.store()
    asked, found = watched(store).asked, list[list[float]]()
    threads = [threading.Thread(target=lambda: found.append(objects.logits("acme"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert asked.count("cat_file") == 1 and found == [objects.expected(1)] * 8


def test_objects_win_over_packed_customers(objects: ObjectPlace, tmp_path: Any) -> None:
    packed = tmp_path / "all.safetensors"
    write_packed([("acme", objects.version(3)), ("bulk", objects.version(2))], packed, objects.session.manifest)
    load_packed(objects.session, packed)
    objects.put("acme", 1)
    objects.store()
    assert objects.logits("acme") == objects.expected(1) and objects.logits("bulk") == objects.expected(2)


def test_who_was_pushed_out_is_read_again(objects: ObjectPlace) -> None:
    objects.session = objects.open(rows=3, max_rows=3)
    for number, name in enumerate("abcd"):
        objects.put(name, number)
    store = objects.store()
    for number, name in enumerate("abcdab"):
        assert objects.logits(name) == objects.expected(number % 4)
    objects.put("c", 9)
    store.look()
    assert set(store._read) == {"a", "b"} == set(objects.session.customers())
    assert objects.logits("c") == objects.expected(9)


def test_marks_of_a_listing_are_those_of_the_objects(objects: ObjectPlace) -> None:
    objects.put("acme", 1)
    bucket = Bucket(objects.url)
    assert [found for page in bucket.pages() for found in page] == [("acme", bucket.read("acme")[1])]
    assert (
        mark_of({"ETag": '"5d41"', "size": 1}) == mark_of({"ETag": "5d41", "LastModified": "x"}) != mark_of({"size": 1})
    )


def test_a_session_has_one_store_and_a_closed_one_lets_go(objects: ObjectPlace) -> None:
    store = objects.store()
    with pytest.raises(InputError, match="has a store or a `fetch` already"):
        objects.store()
    store.close()
    store.close()
    assert objects.session.fetch is None
    objects.store().close()


def test_a_place_that_is_not_there(objects: ObjectPlace) -> None:
    objects.url += "/nowhere"
    with pytest.raises(InputError, match="nowhere: there is no such place"):
        objects.store()


def test_names_are_found_by_their_hashes() -> None:
    known = [f"customer-{number}" for number in range(100_000)]
    names = Names(hashes_of(known[start : start + 1000]) for start in range(0, len(known), 1000))
    assert len(names) == 100_000 and names._hashes.nbytes == 800_000
    assert all(name in names for name in known[::977])
    assert not any(f"other-{number}" in names for number in range(1000))
    assert "x" not in Names()
