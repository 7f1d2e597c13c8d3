"""The engine's side of a server of several processes: fronts ask over a Unix socket."""

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.generation.requests import GenerationEvent
from qrlora_deploy.serving.engine.protocol import Engine, Ticket
from qrlora_deploy.serving.engine.rows import Load, RowAnswer
from qrlora_deploy.serving.engine.running import as_ours
from qrlora_deploy.serving.generation.engine import TextEngine
from qrlora_deploy.serving.generation.writing import Writing
from qrlora_deploy.serving.processes.links import BrokenFrameError, Link, record_of
from qrlora_deploy.serving.processes.messages import Kind, pack_answers, pack_error, unpack_rows
from qrlora_deploy.serving.processes.text_messages import pack_events, unpack_requests

TELL_S = 0.1
"""Between two times that fronts are told the counters."""

logger = logging.getLogger(__name__)

Ended = tuple["_Front", int, "Future[list[RowAnswer]]"]
Told = tuple["_Front", int, GenerationEvent]


@dataclass
class _Asked:
    """A request of a front: what is reserved for it, and once its rows came what will be their answer, or once
    requests for text came their writing, of which so many answers are left."""

    engine: Engine
    ticket: Ticket
    customers: list[str | None]
    future: "Future[list[RowAnswer]] | None" = None
    writing: Writing | None = None
    left: int = 0


class EngineSocket:
    """Lets fronts use engines. Its methods belong to one event loop.

    Args:
        engines: by the name of their model.
        path: of the socket, in a folder that nobody else can enter.
    """

    def __init__(self, engines: Mapping[str, Engine], path: Path) -> None:
        self.engines, self._path = engines, path
        self._fronts: set[_Front] = set()
        self._ended: list[Ended] = []
        self._events: list[Told] = []
        self._lock = threading.Lock()
        self._server: asyncio.AbstractServer | None = None

    @property
    def fronts(self) -> int:
        """Connected ones."""
        return len(self._fronts)

    async def start(self) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        self._path.unlink(missing_ok=True)
        self._server = await self._loop.create_unix_server(self._connected, self._path)
        self._path.chmod(0o600)
        self._telling = asyncio.create_task(self._tell())

    async def stop(self) -> None:
        """Let go of every front."""
        if self._server is not None:
            self._telling.cancel()
            self._server.close()
            for front in list(self._fronts):
                front.link.close()

    def _connected(self) -> Link:
        return _Front(self).link

    async def _tell(self) -> None:
        """Tell the fronts the counters again and again."""
        while True:
            record = self.stats()
            for front in self._fronts:
                front.link.send_record(Kind.STATS, 0, record)
            await asyncio.sleep(TELL_S)

    def stats(self) -> dict[str, Any]:
        """Counters of each model's engine."""
        return {name: engine.stats() for name, engine in self.engines.items()}

    def runs(self) -> dict[str, int]:
        """The number of the run that is under way, of each model's engine; 0: none."""
        return {name: engine.stats().running for name, engine in self.engines.items()}

    def joined(self, front: "_Front") -> None:
        """A front is there."""
        self._fronts.add(front)
        front.link.send_record(Kind.STATS, 0, self.stats())

    def left(self, front: "_Front") -> None:
        """A front has gone."""
        self._fronts.discard(front)

    def ended(self, front: "_Front", number: int, future: "Future[list[RowAnswer]]") -> None:
        """A request has ended. From any thread."""
        with self._lock:
            self._ended.append((front, number, future))
            is_first = len(self._ended) == 1
        # One call for all that end together.
        if is_first:
            self._loop.call_soon_threadsafe(self._answer)

    def told(self, front: "_Front", number: int, event: GenerationEvent) -> None:
        """Something has happened to an answer of text. From any thread."""
        with self._lock:
            self._events.append((front, number, event))
            is_first = len(self._events) == 1
        if is_first:
            self._loop.call_soon_threadsafe(self._tell_events)

    def _tell_events(self) -> None:
        with self._lock:
            told, self._events = self._events, []
        together: dict[tuple[_Front, int], list[GenerationEvent]] = {}
        for front, number, event in told:
            together.setdefault((front, number), []).append(event)
        for (front, number), events in together.items():
            front.tell(number, events)

    def _answer(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, []
        for front, number, future in ended:
            front.answer(number, future)


class _Front:
    """A front that is connected, and its requests that have not ended."""

    def __init__(self, socket: EngineSocket) -> None:
        self._socket = socket
        self._asked: dict[int, _Asked] = {}
        self._checking: set[asyncio.Task[None]] = set()
        self.link = Link(self._received, self._lost, lambda link: socket.joined(self))

    def _received(self, link: Link, kind: int, number: int, payload: bytearray) -> None:
        if kind == Kind.ADMIT:
            self._admit(number, payload)
        elif kind in (Kind.RELEASE, Kind.CANCEL):
            self._let_go(number)
        elif kind == Kind.SUBMIT:
            self._submit(number, payload)
        elif kind == Kind.WRITE:
            self._write(number, payload)
        elif kind == Kind.CHECK:
            self._check(number, payload)
        else:
            raise BrokenFrameError(f"a front sends no frames of the kind {kind}")

    def _admit(self, number: int, payload: bytearray) -> None:
        try:
            model, load, names, deadline_s = record_of(payload)
            engine, load = self._socket.engines[model], Load(**load)
            # One name stands for all rows of a request of one customer.
            customers = names * load.rows if len(names) == 1 else names
        except (KeyError, TypeError, ValueError) as error:
            raise BrokenFrameError("a frame that asks for no place") from error
        if number in self._asked:
            raise BrokenFrameError(f"two requests of the number {number}")
        try:
            ticket = engine.admit(load, customers, deadline_s)
        except QrloraError as error:
            self.link.send(Kind.REFUSED, number, pack_error(error))
            return
        self._asked[number] = _Asked(engine, ticket, customers)
        self.link.send(Kind.GRANTED, number)

    def _submit(self, number: int, payload: bytearray) -> None:
        asked = self._asked.get(number)
        if asked is None or asked.future is not None:
            raise BrokenFrameError(f"rows of the request {number}, which has no place")
        rows = unpack_rows(payload, asked.customers)
        asked.future = asked.engine.submit(asked.ticket, rows)
        asked.future.add_done_callback(partial(self._socket.ended, self, number))

    def _write(self, number: int, payload: bytearray) -> None:
        asked = self._asked.get(number)
        if asked is None or asked.writing is not None or not isinstance(asked.engine, TextEngine):
            raise BrokenFrameError(f"requests of the number {number}, which has no place to write")
        requests, every = unpack_requests(payload, asked.customers)
        asked.left = len(requests)
        try:
            asked.writing = asked.engine.write(asked.ticket, requests, partial(self._socket.told, self, number), every)
        except QrloraError as error:
            del self._asked[number]
            self.link.send(Kind.REFUSED, number, pack_error(error))

    def tell(self, number: int, events: Sequence[GenerationEvent]) -> None:
        """Tell what happened to answers of text, unless nobody waits for them any more."""
        asked = self._asked.get(number)
        if asked is None:
            return
        self.link.send(Kind.EVENTS, number, pack_events(events))
        asked.left -= sum(event.answer is not None for event in events)
        if not asked.left:
            del self._asked[number]

    def _check(self, number: int, payload: bytearray) -> None:
        try:
            model, customer = record_of(payload)
            engine = self._socket.engines[model]
        except (KeyError, TypeError, ValueError) as error:
            raise BrokenFrameError("a frame that asks for no customer") from error
        if not isinstance(engine, TextEngine):
            raise BrokenFrameError(f"a question for customers of {model}, which writes no text")
        # It may read a file.
        checking = asyncio.create_task(asyncio.to_thread(engine.check_customer, customer))
        self._checking.add(checking)
        checking.add_done_callback(partial(self._checked, number))

    def _checked(self, number: int, checking: "asyncio.Task[None]") -> None:
        self._checking.discard(checking)
        if checking.cancelled():
            return
        error = checking.exception()
        if error is None:
            self.link.send(Kind.CHECKED, number)
        else:
            self.link.send(Kind.REFUSED, number, pack_error(as_ours(error)))

    def answer(self, number: int, future: "Future[list[RowAnswer]]") -> None:
        """Tell what came of a request, unless nobody waits for it any more."""
        if self._asked.pop(number, None) is None:
            return
        try:
            self.link.send(Kind.ANSWERED, number, *pack_answers(future.result()))
        except CancelledError:
            pass
        except Exception as error:
            self.link.send(Kind.REFUSED, number, pack_error(as_ours(error)))

    def _let_go(self, number: int) -> None:
        asked = self._asked.pop(number, None)
        if asked is None:
            return
        if asked.writing is not None:
            assert isinstance(asked.engine, TextEngine)
            asked.engine.cancel(asked.writing)
        elif asked.future is None:
            asked.engine.release(asked.ticket)
        else:
            asked.future.cancel()

    def _lost(self, link: Link) -> None:
        self._socket.left(self)
        if self._asked:
            logger.warning("a front has gone; its %d requests are dropped", len(self._asked))
        for number in list(self._asked):
            self._let_go(number)
