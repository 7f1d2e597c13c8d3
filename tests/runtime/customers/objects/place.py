"""Customers in an object store, a session, and the events of its store."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.core import url_to_fs

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.io.temporary import scratch_folder
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.customers.events import StoreEvent
from qrlora_deploy.runtime.customers.objects.bucket import Bucket
from qrlora_deploy.runtime.customers.objects.store import ObjectStore
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.runtime.place import INPUTS

SELDOM_S = 3600.0
"""Between listings where a test lists itself."""


class ObjectPlace:
    """Customers under a URL, which the tests write to by a file system of their own."""

    def __init__(self, url: str, bundle: Path, customer: Coefficients) -> None:
        self.url, self.bundle, self.customer = url, bundle, customer
        self.files, self.root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
        self.session = self.open()
        self.events: list[StoreEvent] = []
        self.stores: list[ObjectStore] = []

    def open(self, **options: Any) -> SwitchableSession:
        return SwitchableSession(open_bundle(self.bundle), threads=1, **options)

    def store(self, poll_s: float = SELDOM_S, start: bool = True) -> ObjectStore:
        """A store, which `close` closes."""
        store = ObjectStore(self.session, Bucket(self.url), self.events.append, poll_s)
        self.stores.append(store)
        if start:
            store.start()
        return store

    def close(self) -> None:
        for store in self.stores:
            store.close()

    def version(self, number: float) -> Coefficients:
        return replace(self.customer, values=self.customer.values * np.float32(number))

    def put(self, name: str, number: float) -> None:
        self.write(name, content_of(self.version(number)))

    def write(self, name: str, content: bytes) -> None:
        self.files.pipe_file(f"{self.root}/{name}.safetensors", content)

    def remove(self, name: str) -> None:
        self.files.rm_file(f"{self.root}/{name}.safetensors")

    def logits(self, name: str | None, session: SwitchableSession | None = None) -> list[float]:
        found: list[float] = (session or self.session).predict(INPUTS, [name])[0][0].tolist()
        return found

    def expected(self, number: float) -> list[float]:
        other = self.open()
        other.load("it", self.version(number))
        return self.logits("it", other)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def content_of(customer: Coefficients) -> bytes:
    """A coefficients file."""
    with scratch_folder() as folder:
        path = folder / "customer.safetensors"
        write_coefficients(customer, path)
        return path.read_bytes()
