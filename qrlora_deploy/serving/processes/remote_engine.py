"""The front's side of an engine in another process: `RemoteEngine` is an `Engine` for one event loop."""

import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from qrlora_deploy.errors import InputError, MalformedInputError
from qrlora_deploy.runtime.bundle.manifest import Manifest
from qrlora_deploy.serving.engine.protocol import EngineStats, Ticket, sum_of
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer
from qrlora_deploy.serving.processes.engine_link import AGAIN_S, FAILED, EngineLink, RemoteTicket
from qrlora_deploy.serving.processes.messages import Kind
from qrlora_deploy.serving.refusals import DrainingError


class RemoteEngine:
    """An `Engine` in other processes, one for each device. It belongs to the event loop of its links.

    A request that names a customer goes to the device of that customer, so that the customer's quota and its share
    of the queue are kept in one place; of several customers the first one counts. Other requests go to the
    device where this front has the least rows open.

    Args:
        links: to the processes.
        model: name of the model there.
        manifest: of its bundle.
    """

    def __init__(self, links: Sequence[EngineLink], model: str, manifest: Manifest) -> None:
        self.manifest = manifest
        self._links, self._model = links, model

    def check_room(self) -> None:
        """As `Engine.check_room`: the engine itself is asked by `admit`."""

    def admit(self, load: Load, customers: Sequence[str | None], deadline_s: float | None = None) -> RemoteTicket:
        """As `Engine.admit`; what the engine says comes by the ticket's `pending`."""
        if not 0 < load.rows == len(customers):
            raise MalformedInputError(f"a request needs rows and a customer for each, not {len(customers)} of {load}")
        return self._link(customers[0]).admit(self._model, load, customers, deadline_s)

    def _link(self, customer: str | None) -> EngineLink:
        if customer is None:
            return min(self._links, key=lambda link: (not link.stats or link.silent, link.open_rows))
        return self._links[zlib.crc32(customer.encode("utf-8", "surrogatepass")) % len(self._links)]

    def release(self, ticket: Ticket) -> None:
        """As `Engine.release`."""
        asked = asked_of(ticket)
        if asked.future is None:
            asked.link.drop(asked, Kind.RELEASE)

    def submit(self, ticket: Ticket, rows: Sequence[Row]) -> "Future[list[RowAnswer]]":
        """As `Engine.submit`.

        Raises:
            InputError: the ticket was used before.
        """
        asked = asked_of(ticket)
        if asked.future is not None:
            raise InputError("a ticket is given to submit once, and not after release")
        asked.rows, asked.future = rows, Future()
        if [row.customer for row in rows] != list(asked.customers):
            asked.link.drop(asked, Kind.RELEASE)
            asked.future.set_exception(
                MalformedInputError("the rows are not of the customers that their ticket is for")
            )
        elif asked.number in asked.link.open:
            asked.link.submit(asked)
        else:
            asked.future.set_exception(DrainingError(FAILED))
        return asked.future

    def stats(self) -> EngineStats:
        """As `Engine.stats`, a tenth of a second old at most; those of all devices together."""
        known = [link.stats[self._model] for link in self._links if self._model in link.stats]
        together = sum_of(known)
        # One device that is away makes the server not ready: its customers have no other one.
        all_there = len(known) == len(self._links) and not any(link.silent for link in self._links)
        return together if all_there else replace(together, draining=True)

    def drain(self, timeout_s: float) -> bool:
        """As `Engine.drain`, of the requests of this front. The engine itself goes on."""
        until = time.monotonic() + timeout_s
        while any(link.open for link in self._links) and time.monotonic() < until:
            time.sleep(AGAIN_S / 5)
        return not any(link.open for link in self._links)

    def close(self) -> None:
        """As `Engine.close`; the links are closed by who made them."""


def asked_of(ticket: Ticket) -> RemoteTicket:
    """The ticket as it was given.

    Raises:
        InputError: it is another engine's.
    """
    if not isinstance(ticket, RemoteTicket):
        raise InputError(f"a ticket comes from admit; {type(ticket).__name__} is none")
    return ticket
