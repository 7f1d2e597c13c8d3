"""A small honest engine for tests of the fronts: each request is one run of a session, in one thread."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.sessions.buckets import filling
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer
from qrlora_deploy.serving.refusals import DrainingError, OverloadedError


@dataclass
class DirectTicket:
    """A place in the queue."""

    load: Load
    pending: None = None


class DirectEngine:
    """Implements `Engine` over a session, with the customers that it is given.

    Attributes:
        max_rows: rows that are admitted at a time; a test may lower it.
    """

    def __init__(self, session: SwitchableSession, customers: Mapping[str, Coefficients]) -> None:
        self.session, self.manifest = session, session.manifest
        self.max_rows, self._admitted, self._stats = 4096, 0, EngineStats()
        self._digests = {name: customer.digest for name, customer in customers.items()}
        for name, customer in customers.items():
            session.load(name, customer)
        self.pool = ThreadPoolExecutor(1)

    def check_room(self) -> None:
        if self._admitted >= self.max_rows:
            raise OverloadedError("the queue is full")

    def admit(self, load: Load, customers: Sequence[str | None], deadline_s: float | None = None) -> DirectTicket:
        if self._stats.draining:
            raise DrainingError("the server ends")
        if self._admitted + load.rows > self.max_rows:
            raise OverloadedError("the queue is full")
        self._admitted += load.rows
        return DirectTicket(load)

    def release(self, ticket: DirectTicket) -> None:
        self._admitted -= ticket.load.rows
        ticket.load = Load(0, 0, 0)

    def submit(self, ticket: DirectTicket, rows: Sequence[Row]) -> "Future[list[RowAnswer]]":
        future = self.pool.submit(self._run, rows)
        future.add_done_callback(lambda _: self.release(ticket))
        return future

    def _run(self, rows: Sequence[Row]) -> list[RowAnswer]:
        length, fill = max(row.length for row in rows), filling(self.manifest)
        inputs = {
            name: np.array(
                [np.pad(row.inputs[name], (0, length - row.length), constant_values=fill.get(name, 0)) for row in rows]
            )
            for name in rows[0].inputs
        }
        logits, labels = self.session.predict(inputs, [row.customer for row in rows])
        self._stats = replace(
            self._stats, rows=self._stats.rows + len(rows), batches=self._stats.batches + 1, last_run_s=time.time()
        )
        return [
            RowAnswer(logits[number, : len(names)], names, self._digests.get(row.customer or "", ""))
            for number, (row, names) in enumerate(zip(rows, labels, strict=True))
        ]

    def stats(self) -> EngineStats:
        return self._stats

    def drain(self, timeout_s: float) -> bool:
        self._stats = replace(self._stats, draining=True)
        self.pool.shutdown()
        return True

    def close(self) -> None:
        self.drain(0)
