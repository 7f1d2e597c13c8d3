"""A front's connection to the process of an engine, and the requests that are open there."""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationEvent, GenerationRequest
from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer
from qrlora_deploy.serving.generation.writing import Tell
from qrlora_deploy.serving.processes.links import BrokenFrameError, Link, record_of
from qrlora_deploy.serving.processes.messages import Kind, pack_rows, unpack_answers, unpack_error, unpack_stats
from qrlora_deploy.serving.processes.text_messages import pack_requests, unpack_events
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
        writing: answers of text that were asked for instead.
    """

    link: "EngineLink"
    load: Load
    customers: Sequence[str | None]
    number: int
    pending: "asyncio.Future[None]"
    rows: Sequence[Row] = ()
    future: "Future[list[RowAnswer]] | None" = None
    writing: "RemoteWriting | None" = None


@dataclass(eq=False)
class RemoteWriting:
    """Answers that an engine was asked for.

    Attributes:
        ticket: their place.
        requests: one for each.
        tell: gets their events.
        base_digest: of the model.
        ended: numbers of those that have ended.
    """

    ticket: RemoteTicket
    requests: Sequence[GenerationRequest]
    tell: Tell
    base_digest: str
    ended: set[int] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether all have ended."""
        return len(self.ended) == len(self.requests)

    def told(self, event: GenerationEvent) -> None:
        """Something has happened."""
        if event.answer is not None:
            self.ended.add(event.number)
        self.tell(event)

    def fail(self, error: QrloraError) -> None:
        """The others end by an error."""
        for number, request in enumerate(self.requests):
            if number not in self.ended:
                answer = GenerationAnswer("", (), "error", request.customer, self.base_digest, error=error)
                self.told(GenerationEvent(number, answer=answer))


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
        self._checks: dict[int, asyncio.Future[None]] = {}

    @property
    def open_rows(self) -> int:
        """Rows of the requests that have not ended."""
        return sum(ticket.load.rows for ticket in self.open.values())

    async def start(self) -> None:
        """Reach the engine, however long it takes to start."""
        self.loop = asyncio.get_running_loop()
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
        there = self._there()
        ticket = RemoteTicket(self, load, customers, next(self._numbers), asyncio.get_running_loop().create_future())
        self.open[ticket.number] = ticket
        names = customers[:1] if len(set(customers)) == 1 else customers
        there.send_record(Kind.ADMIT, ticket.number, [model, load, list(names), deadline_s])
        return ticket

    def _there(self) -> Link:
        if self._link is None or not self.stats:
            raise DrainingError(AWAY)
        if self.silent:
            raise DrainingError(SILENT)
        return self._link

    async def check(self, model: str, customer: str) -> None:
        """Make sure that a customer of a decoder is there.

        Raises:
            QrloraError: it is not, or the engine cannot say.
        """
        there, number = self._there(), next(self._numbers)
        self._checks[number] = self.loop.create_future()
        try:
            there.send_record(Kind.CHECK, number, [model, customer])
            await self._checks[number]
        finally:
            del self._checks[number]

    def write(self, ticket: RemoteTicket, requests: Sequence[GenerationRequest], every: bool) -> None:
        """Send requests for text."""
        assert self._link is not None
        self._link.send(Kind.WRITE, ticket.number, pack_requests(requests, every))

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
        if number in self._checks:
            self._checked(number, unpack_error(payload) if kind == Kind.REFUSED else None)
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
        elif kind == Kind.EVENTS and ticket.writing is not None:
            for event in unpack_events(payload):
                ticket.writing.told(event)
            if ticket.writing.is_over:
                del self.open[number]
        else:
            raise BrokenFrameError(f"an engine sends no frames of the kind {kind} now")

    def _checked(self, number: int, error: QrloraError | None) -> None:
        waiting = self._checks[number]
        if waiting.done():
            return
        if error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(error)

    def _end(self, ticket: RemoteTicket, error: QrloraError) -> None:
        """Tell a request that it has failed."""
        self.open.pop(ticket.number, None)
        if not ticket.pending.done():
            ticket.pending.set_exception(error)
        elif ticket.writing is not None:
            ticket.writing.fail(error)
        elif ticket.future is not None and ticket.future.set_running_or_notify_cancel():
            ticket.future.set_exception(error)

    def _lost(self, link: Link) -> None:
        self._link, self.stats, self.silent = None, {}, False
        for ticket in list(self.open.values()):
            self._end(ticket, DrainingError(FAILED))
        for number in self._checks:
            self._checked(number, DrainingError(FAILED))
        self._lost_one.set()
