"""A folder of customers with its session, and waiting for what its watcher does."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.customers.store import CustomerStore, StoreEvent
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession

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
