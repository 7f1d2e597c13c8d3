"""The front's side of an engine in another process: `RemoteEngine` is an `Engine` for one event loop."""

import asyncio
import itertools
import logging
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qrlora_deploy.errors import InputError, MalformedInputError, QrloraError
from qrlora_deploy.runtime.bundle.manifest import Manifest
from qrlora_deploy.serving.engine.protocol import EngineStats, Ticket, sum_of
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer
from qrlora_deploy.serving.processes.links import BrokenFrameError, Link, record_of
from qrlora_deploy.serving.processes.messages import Kind, pack_rows, unpack_answers, unpack_error, unpack_stats
from qrlora_deploy.serving.refusals import DrainingError

AGAIN_S = 0.05
"""Between two tries to reach an engine."""

SILENT_S = 5.0
"""An engine that has told no counters for so long is not asked, and the server is not ready, until it does again."""

AWAY = "the engine is starting; try again soon"
SILENT = "the engine does not answer; try again soon"
FAILED = "the engine ended before the request was answered; try again soon"

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class RemoteTicket:
    """A place that was asked for.

    Attributes:
        load: what it was asked for.
        customers: of the rows.
        number: of the request.
        pending: done when the place is granted, or raises why it is not.
        link: to the engine that was asked.
        rows: what was given to `submit`.
        future: of their answers.
    """

    link: "EngineLink"
    load: Load
    customers: Sequence[str | None]
    number: int
    pending: "asyncio.Future[None]"
    rows: Sequence[Row] = ()
    future: "Future[list[RowAnswer]] | None" = None


class EngineLink:
    """A front's connection to an engine's process, which is made again when it is lost. It belongs to one event loop.

    Args:
        path: of the engine's socket.

    Attributes:
        stats: counters by model, as the engine told them last; empty while it cannot be reached.
        open: requests that have not ended.
        silent: it is connected and has told nothing for `SILENT_S`: it is stopped, or hangs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers = itertools.count(1)
        self._link: Link | None = None
        self.stats: dict[str, EngineStats] = {}
        self.open: dict[int, RemoteTicket] = {}
        self.silent = False
        self._told = 0

    @property
    def open_rows(self) -> int:
        """Rows of the requests that have not ended."""
        return sum(ticket.load.rows for ticket in self.open.values())

    async def start(self) -> None:
        """Reach the engine, however long it takes to start."""
        self._ends = asyncio.Event()
        self._lost_one = asyncio.Event()
        await self._reach()
        self._following = [asyncio.create_task(self._follow()), asyncio.create_task(self._listen())]

    async def _reach(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.stats:
            self._lost_one.clear()
            with suppress(OSError):
                _, self._link = await loop.create_unix_connection(
                    lambda: Link(self._received, self._lost), str(self._path)
                )
                # It is of use once it told its counters.
                while not (self.stats or self._lost_one.is_set()):
                    await asyncio.sleep(AGAIN_S / 5)
            if not self.stats:
                await asyncio.sleep(AGAIN_S)

    async def _follow(self) -> None:
        while True:
            await self._lost_one.wait()
            await self._reach()

    async def _listen(self) -> None:
        """Notice an engine that is silent. Steps are counted: who was stopped itself has not listened meanwhile."""
        told = steps = 0
        while True:
            await asyncio.sleep(SILENT_S / 10)
            steps = steps + 1 if self._told == told else 0
            told = self._told
            if steps >= 10 and self._link is not None and not self.silent:
                self.silent = True
                logger.warning("an engine says nothing for %g s; until it does, requests are refused", SILENT_S)

    def close(self) -> None:
        """Let go of the engine."""
        for task in self._following:
            task.cancel()
        if self._link is not None:
            self._link.close()

    def admit(self, model: str, load: Load, customers: Sequence[str | None], deadline_s: float | None) -> RemoteTicket:
        """Ask for a place.

        Raises:
            DrainingError: the engine cannot be reached, or says nothing.
        """
        if self._link is None or not self.stats:
            raise DrainingError(AWAY)
        if self.silent:
            raise DrainingError(SILENT)
        ticket = RemoteTicket(self, load, customers, next(self._numbers), asyncio.get_running_loop().create_future())
        self.open[ticket.number] = ticket
        names = customers[:1] if len(set(customers)) == 1 else customers
        self._link.send_record(Kind.ADMIT, ticket.number, [model, load, list(names), deadline_s])
        return ticket

    def submit(self, ticket: RemoteTicket) -> None:
        """Send the rows of a request."""
        assert ticket.future is not None and self._link is not None
        self._link.send(Kind.SUBMIT, ticket.number, *pack_rows(ticket.rows))
        ticket.future.add_done_callback(lambda future: self.drop(ticket, Kind.CANCEL) if future.cancelled() else None)

    def drop(self, ticket: RemoteTicket, kind: Kind) -> None:
        """Nobody waits for a request any more. Twice is no error."""
        if self.open.pop(ticket.number, None) is not None and self._link is not None:
            self._link.send(kind, ticket.number)

    def _received(self, link: Link, kind: int, number: int, payload: bytearray) -> None:
        if kind == Kind.STATS:
            self.stats = {model: unpack_stats(record) for model, record in record_of(payload).items()}
            self._told += 1
            self.silent = False
            return
        ticket = self.open.get(number)
        if ticket is None:
            return
        if kind == Kind.GRANTED:
            if not ticket.pending.done():
                ticket.pending.set_result(None)
        elif kind == Kind.REFUSED:
            self._end(ticket, unpack_error(payload))
        elif kind == Kind.ANSWERED and ticket.future is not None:
            answers = unpack_answers(payload, ticket.rows)
            del self.open[number]
            if ticket.future.set_running_or_notify_cancel():
                ticket.future.set_result(answers)
        else:
            raise BrokenFrameError(f"an engine sends no frames of the kind {kind} now")

    def _end(self, ticket: RemoteTicket, error: QrloraError) -> None:
        """Tell a request that it has failed."""
        self.open.pop(ticket.number, None)
        if not ticket.pending.done():
            ticket.pending.set_exception(error)
        elif ticket.future is not None and ticket.future.set_running_or_notify_cancel():
            ticket.future.set_exception(error)

    def _lost(self, link: Link) -> None:
        self._link, self.stats, self.silent = None, {}, False
        for ticket in list(self.open.values()):
            self._end(ticket, DrainingError(FAILED))
        self._lost_one.set()


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
        asked = _asked(ticket)
        if asked.future is None:
            asked.link.drop(asked, Kind.RELEASE)

    def submit(self, ticket: Ticket, rows: Sequence[Row]) -> "Future[list[RowAnswer]]":
        """As `Engine.submit`.

        Raises:
            InputError: the ticket was used before.
        """
        asked = _asked(ticket)
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


def _asked(ticket: Ticket) -> RemoteTicket:
    if not isinstance(ticket, RemoteTicket):
        raise InputError(f"a ticket comes from admit; {type(ticket).__name__} is none")
    return ticket
