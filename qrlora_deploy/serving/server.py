"""The life of a server's process: it listens, reloads at SIGHUP, and ends at SIGTERM without losing a request.

At SIGTERM or SIGINT readiness goes off, so that load balancers look elsewhere; for `drain_delay_s` everything is
still answered; then nobody new is taken, what was begun is finished within `drain_s`, and the process ends. A
second signal ends it at once.
"""

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from qrlora_deploy.errors import QrloraError, argument
from qrlora_deploy.serving.garbage import calm_collector
from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.http.limits import HttpLimits
from qrlora_deploy.serving.http.listener import HttpListener
from qrlora_deploy.serving.tls import Tls

END, RELOAD = ("SIGINT", "SIGTERM"), "SIGHUP"

logger = logging.getLogger(__name__)


class Starts(Protocol):
    """Begins with the server."""

    def start(self) -> Coroutine[Any, Any, None]:
        """Begin; done when it is there."""


class Companion(Protocol):
    """Another front of the same models and the same life, such as gRPC's, that begins and ends with this one."""

    @property
    def port(self) -> int:
        """Where it listens, once it was started."""

    async def start(self) -> None:
        """Begin to listen."""

    async def stop(self, grace_s: float) -> None:
        """Take nobody new, finish what was begun within so many seconds, and end."""

    def hurry(self) -> None:
        """Wait no longer in `stop`."""

    def reload(self) -> None:
        """Read the files of certificates again. From any thread."""


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens and how it ends.

    Attributes:
        host: address.
        port: 0: any that is free.
        tls: None: without.
        limits: of its clients.
        drain_delay_s: from the signal that ends it to when nobody new is taken.
        drain_s: from there to the end, for what was begun.
        is_shared: other processes listen on the same ports.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    tls: Tls | None = None
    limits: HttpLimits = field(default_factory=HttpLimits)
    drain_delay_s: float = 0.0
    drain_s: float = 45.0
    is_shared: bool = False


class Server:
    """A front, listening, with the companions that share its life.

    Args:
        front: what answers.
        options: where and how.
        reload: called in a thread at SIGHUP.
        companions: further fronts.
        before: what must be there before anybody is listened to, such as connections to engines.
        has_signals: False: whoever made it calls `stop` and `begin_reload`.

    Raises:
        InputError: the address is taken or none, or a file of TLS cannot be used.
    """

    def __init__(
        self,
        front: Front,
        options: ServerOptions,
        reload: Callable[[], None] = lambda: None,
        companions: Sequence[Companion] = (),
        before: Sequence[Starts] = (),
        has_signals: bool = True,
    ) -> None:
        self._front, self._options, self._reload = front, options, reload
        self._before, self._has_signals = before, has_signals
        app = make_app(front, options.limits)
        self.http = HttpListener(app, options.host, options.port, options.tls, options.limits, options.is_shared)
        self._listeners: tuple[Companion, ...] = (self.http, *companions)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0

    def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Serve until a signal, or `stop`, ends it.

        Args:
            started: called when requests are taken.

        Raises:
            InputError: a companion cannot listen.
            QrloraError: not everything was answered in time.
        """
        loops = asyncio.Runner(loop_factory=self.http.config.get_loop_factory())
        with calm_collector(), loops as runner, _signals_restored():
            runner.run(self._run(started))

    def stop(self) -> None:
        """End as at SIGTERM; the second call ends at once. From any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)

    async def _run(self, started: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending, self._at_once = asyncio.Event(), asyncio.Event()
        self._listen_to_signals()
        begun: list[Companion] = []
        following = asyncio.create_task(self._front.live_window.follow())
        try:
            await self._wait_for_what_is_before()
            for listener in self._listeners if not self._ending.is_set() else ():
                await listener.start()
                begun.append(listener)
            if not self._ending.is_set():
                self._front.life.begin()
                started()
            await self._ending.wait()
        finally:
            self._front.life.drain()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._options.drain_delay_s if self._ending.is_set() else 0):
                    await self._at_once.wait()
            await self._finish(begun)
            following.cancel()

    async def _wait_for_what_is_before(self) -> None:
        """Or for the end, which may come first."""
        ending = asyncio.create_task(self._ending.wait())
        for it in self._before:
            starting = asyncio.ensure_future(it.start())
            await asyncio.wait((starting, ending), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                break
            starting.result()
        ending.cancel()

    def _listen_to_signals(self) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if not (is_main and self._has_signals) or self._loop is None:
            return
        for name in END:
            self._loop.add_signal_handler(getattr(signal, name), self._end)
        if hasattr(signal, RELOAD):
            self._loop.add_signal_handler(signal.SIGHUP, self.begin_reload)

    def _end(self) -> None:
        self._signals += 1
        self._ending.set()
        if self._signals > 1:
            self._at_once.set()
            for listener in self._listeners:
                listener.hurry()

    def begin_reload(self) -> None:
        """Read certificates and all else again, as at SIGHUP. In the event loop."""
        self._reloading = asyncio.create_task(self._reloaded())

    async def _reloaded(self) -> None:
        try:
            for listener in self._listeners:
                await asyncio.to_thread(listener.reload)
            await asyncio.to_thread(self._reload)
            logger.info("reloaded")
        # What was there before goes on.
        except Exception as error:
            logger.error("not reloaded: %s", error)

    async def _finish(self, begun: Sequence[Companion]) -> None:
        last = time.monotonic() + (0.0 if self._at_once.is_set() else self._options.drain_s)
        await asyncio.gather(*(listener.stop(max(0.0, last - time.monotonic())) for listener in begun))
        # Every connection has its answer by now, or its time is over.
        engines = [model.engine for model in self._front.models]
        left_s = max(0.0, last - time.monotonic())
        done = await asyncio.gather(*(asyncio.to_thread(engine.drain, left_s) for engine in engines))
        for engine in engines:
            await asyncio.to_thread(engine.close)
        if not all(done):
            raise QrloraError(
                f"not everything was answered within {self._options.drain_s:g} s; raise {argument('drain_s')}"
            )


@contextmanager
def _signals_restored() -> Iterator[None]:
    """The loop's handlers give way to those that were there before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in (*END, RELOAD) if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
