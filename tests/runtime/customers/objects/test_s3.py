"""Customers in a real S3 API: pages, tags, a bucket that is missing, and a server that goes away and comes back.

QRLORA_MOTO=FOLDER/bin/python pytest tests/runtime/customers/objects/test_s3.py
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="needs s3fs")

from qrlora_deploy.errors import InputError, NotReadyError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.customers.objects.bucket import Bucket
from qrlora_deploy.runtime.customers.objects.store import ObjectStore
from tests.runtime.customers.objects.place import ObjectPlace
from tests.runtime.customers.objects.s3 import BUCKET, S3Server

PYTHON = os.environ.get("QRLORA_MOTO", "")

pytestmark = pytest.mark.skipif(not PYTHON, reason="QRLORA_MOTO names no Python with moto[server]")


@pytest.fixture
def server() -> Iterator[S3Server]:
    server = S3Server(PYTHON)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.make_bucket()
        yield server
    server.kill()


@pytest.fixture
def place(server: S3Server, switchable: Path, tiny_customer: Coefficients) -> Iterator[ObjectPlace]:
    place = ObjectPlace(f"s3://{BUCKET}/some/prefix/", switchable, tiny_customer)
    yield place
    place.close()


def test_customers_of_a_bucket(place: ObjectPlace) -> None:
    place.put("acme", 1)
    place.put("beta", 2)
    place.files.pipe_file(f"{place.root}/deeper/gamma.safetensors", b"not here")
    place.files.pipe_file(f"{BUCKET}/some/prefix-of-another/delta.safetensors", b"nor here")
    store = place.store()
    assert store.stats().customers == 2
    assert place.logits("acme") == place.expected(1) and place.logits("beta") == place.expected(2)
    place.put("acme", 3)
    place.remove("beta")
    store.look()
    assert place.logits("acme") == place.expected(3)
    for name in ("beta", "gamma", "delta"):
        with pytest.raises(UnknownCustomerError):
            place.logits(name)
    assert sorted(place.kinds()) == ["loaded", "loaded", "loaded", "removed"]
    # The same content, put again, has the same tag and is not read again.
    place.put("acme", 3)
    store.look()
    assert len(place.kinds()) == 4


def test_a_bucket_is_listed_in_pages(place: ObjectPlace) -> None:
    files = {f"{place.root}/c{number}.safetensors": b"x" for number in range(1100)}
    place.files.pipe(files)
    bucket = Bucket(place.url)
    assert [len(page) for page in bucket.pages()] == [1000, 100]
    store = place.store()
    assert store.stats().customers == 1100
    assert {name for page in bucket.pages() for name, _ in page} == {f"c{number}" for number in range(1100)}


def test_an_empty_prefix_a_missing_bucket_and_an_empty_object(place: ObjectPlace) -> None:
    assert place.store().stats().customers == 0
    with pytest.raises(InputError, match="s3://no-such-bucket/x: there is no such place"):
        list(Bucket("s3://no-such-bucket/x").pages())
    place.write("empty", b"")
    with pytest.raises(InputError, match="empty.safetensors"):
        Bucket(place.url).coefficients("empty")


def wait_until_it_is_asked_again(store: ObjectStore) -> None:
    """After a failure the store rests, and nothing would be asked."""
    while time.monotonic() < store.bucket.patience._rests_until_s:
        time.sleep(0.01)


def test_a_server_that_goes_away_and_comes_back(place: ObjectPlace, server: S3Server) -> None:
    place.put("acme", 1)
    place.put("cold", 2)
    store = place.store()
    before = place.logits("acme")
    server.kill()
    for _ in range(2):
        with pytest.raises(NotReadyError, match="does not answer"):
            place.logits("cold")
        with pytest.raises(NotReadyError, match="does not answer"):
            store.look()
    assert not store.stats().up and place.logits("acme") == before
    # Another one at its place, without the bucket, and then with an empty one.
    server.start()
    with pytest.raises(InputError, match="there is no such place"):
        store.look()
    assert place.logits("acme") == before
    wait_until_it_is_asked_again(store)
    # S3 says the same of a bucket that is missing and of an object.
    with pytest.raises(NotReadyError, match="does not answer"):
        place.logits("cold")
    server.make_bucket()
    with pytest.raises(InputError, match="is empty"):
        store.look()
    assert place.logits("acme") == before
    wait_until_it_is_asked_again(store)
    with pytest.raises(NotReadyError, match="does not answer"):
        place.logits("cold")
    place.put("acme", 3)
    place.put("cold", 4)
    store.look()
    assert store.stats().up
    assert place.logits("acme") == place.expected(3) and place.logits("cold") == place.expected(4)
