"""The connection of a process to the supervisor that started it, seen from the process."""

import asyncio
import itertools
import socket
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import orjson

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.processes.links import HEAD, BrokenFrameError, Link, record_of
from qrlora_deploy.serving.refusals import DrainingError

FLUSH_S = 0.5
"""Between two times that a front tells what it counted: what it counted since is lost when it is killed."""

PATIENCE_S = 5.0
"""For the supervisor to answer."""


class Order(IntEnum):
    """Of frames between a process and its supervisor."""

    READY = 1
    FAILED = 2
    STATE = 3
    COUNTED = 4
    SCRAPE = 5
    FORGOTTEN = 6
    LOOK = 7
    STOP = 11
    RELOAD = 12
    ASK_STATE = 13
    SCRAPED = 14
    FORGET = 15
    SEEN = 16
    PING = 17
    PONG = 18
    OPENING = 19


class Control:
    """A process' end: what it is told to do, and what it tells. It belongs to one event loop, but for
    `failed` and `opening`.

    Args:
        descriptor: of a connected socket.
        stop: called to end as a server does at SIGTERM; again: to end at once. Also when the supervisor has gone.
        reload: called to read files again.
        state: gives what the supervisor asks for.
        forget: called with a model and a customer that was erased.
        runs: gives the number of the run that is under way by what runs it, as `EngineStats.running`.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._last_words = self._socket.dup()
        self._numbers = itertools.count(1)
        self._link: Link | None = None
        self._counted: list[Any] = []
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self.stop: Callable[[], None] = lambda: None
        self.reload: Callable[[], None] = lambda: None
        self.state: Callable[[], Any] = lambda: None
        self.forget: Callable[[str, str], None] = lambda model, customer: None
        self.runs: Callable[[], dict[str, int]] = dict

    async def start(self) -> None:
        """Begin to listen to the supervisor."""
        loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        _, self._link = await loop.create_unix_connection(
            lambda: Link(self._received, lambda link: self.stop()), sock=self._socket
        )
        self._flushing = asyncio.create_task(self._flush_again_and_again())

    def tell(self, order: Order, record: Any = None) -> None:
        """Tell the supervisor something."""
        if self._link is not None:
            self._link.send_record(order, 0, record)

    def ready(self) -> None:
        """Say that everything is there."""
        self.tell(Order.READY)

    def failed(self, error: QrloraError) -> None:
        """Say why the process ends. After the event loop has ended, or before it began."""
        self._say(Order.FAILED, [str(error), error.exit_code])

    def opening(self, what: str) -> None:
        """Say what is opened from now on, as `opening_watch.Begin`. Before the event loop begins."""
        self._say(Order.OPENING, what)

    def _say(self, order: Order, record: Any) -> None:
        body = orjson.dumps(record)
        self._last_words.setblocking(True)
        self._last_words.sendall(HEAD.pack(len(body), order, 0) + body)

    def count(self, *counted: Any) -> None:
        """Remember something that the supervisor counts."""
        self._counted.append(counted)

    async def ask(self, order: Order) -> bytes:
        """What the supervisor knows of the whole server: `SCRAPE` asks for all metrics, `LOOK` for the last minutes.

        Raises:
            DrainingError: it does not answer.
        """
        assert self._link is not None
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        self._flush()
        self._link.send(order, number)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._asked[number]
        except TimeoutError:
            raise DrainingError("the process that knows this does not answer; try again soon") from None
        finally:
            del self._asked[number]

    def _flush(self) -> None:
        if self._counted:
            self.tell(Order.COUNTED, self._counted)
            self._counted = []

    async def _flush_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            self._flush()

    def _received(self, link: Link, kind: int, number: int, payload: bytearray) -> None:
        if kind == Order.STOP:
            self._flush()
            self.stop()
        elif kind == Order.RELOAD:
            self.reload()
        elif kind == Order.PING:
            link.send_record(Order.PONG, number, self.runs())
        elif kind == Order.ASK_STATE:
            self._flush()
            link.send_record(Order.STATE, number, self.state())
        elif kind in (Order.SCRAPED, Order.SEEN):
            waiting = self._asked.get(number)
            if waiting is not None and not waiting.done():
                waiting.set_result(bytes(payload))
        elif kind == Order.FORGET:
            self.forget(*record_of(payload))
        else:
            raise BrokenFrameError(f"a supervisor sends no frames of the kind {kind}")


class SharedMetrics:
    """Metrics of a front: what it counts is added up by the supervisor.

    Args:
        control: to it.
        customers: that are counted by name.
    """

    def __init__(self, control: Control, customers: Sequence[str] = ()) -> None:
        self._control, self._customers = control, frozenset(customers)

    def observe(self, route: str, code: int, seconds: float, rows: int, customers: Sequence[str | None] = ()) -> None:
        """As `Metrics.observe`."""
        named = [name for name in customers if name in self._customers] if self._customers else []
        self._control.count(route, code, seconds, rows, named)

    async def scrape(self) -> bytes:
        """As `Metrics.scrape`."""
        return await self._control.ask(Order.SCRAPE)


class SharedWindow:
    """The last minutes of all processes, which the supervisor keeps.

    Args:
        control: to it.
    """

    def __init__(self, control: Control) -> None:
        self._control = control

    async def follow(self) -> None:
        """Nothing: the supervisor does."""

    async def ask(self) -> dict[str, Any]:
        """As `Window.ask`."""
        record: dict[str, Any] = orjson.loads(await self._control.ask(Order.LOOK))
        return record
