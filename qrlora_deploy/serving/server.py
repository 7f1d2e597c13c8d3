"""The life of a server's process: it listens, reloads at SIGHUP, and ends at SIGTERM without losing a request.

At SIGTERM or SIGINT readiness goes off, so that load balancers look elsewhere; for `drain_delay_s` everything is
still answered; then nobody new is taken, what was begun is finished within `drain_s`, and the process ends. A
second signal ends it at once.
"""

import asyncio
import logging
import math
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import uvicorn

from qrlora_deploy.errors import InputError, QrloraError, library_errors
from qrlora_deploy.serving.addresses import bound_socket, url_of
from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.connections import guarded_by
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.http.limits import HttpLimits
from qrlora_deploy.serving.tls import Tls

BACKLOG = 2048
STEP_S = 0.02
END, RELOAD = ("SIGINT", "SIGTERM"), "SIGHUP"

logger = logging.getLogger(__name__)


class Companion(Protocol):
    """Another front of the same models and the same life, such as gRPC's, that begins and ends with this one."""

    @property
    def url(self) -> str:
        """For people, once it listens."""

    async def start(self) -> None:
        """Begin to listen."""

    async def stop(self, grace_s: float) -> None:
        """Take nobody new, finish what was begun within so many seconds, and end. A second call may hurry the first."""


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
    """

    host: str = "127.0.0.1"
    port: int = 8080
    tls: Tls | None = None
    limits: HttpLimits = field(default_factory=HttpLimits)
    drain_delay_s: float = 0.0
    drain_s: float = 45.0


class HttpServer(uvicorn.Server):
    """uvicorn's, whose signals are handled here."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Nothing."""
        return nullcontext()


class Server:
    """A front, listening.

    Args:
        front: what answers.
        options: where and how.
        reload: called in a thread at SIGHUP.
        companions: further fronts.

    Raises:
        InputError: the address is taken or none, or a file of TLS cannot be used.
    """

    def __init__(
        self,
        front: Front,
        options: ServerOptions,
        reload: Callable[[], None] = lambda: None,
        companions: Sequence[Companion] = (),
    ) -> None:
        self._front, self._options, self._reload, self._companions = front, options, reload, companions
        self._config = make_config(front, options)
        self._http = HttpServer(self._config)
        self._socket = bound_socket(options.host, options.port)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0

    @property
    def port(self) -> int:
        """Where it listens."""
        number: int = self._socket.getsockname()[1]
        return number

    @property
    def url(self) -> str:
        """For people."""
        return url_of("https" if self._options.tls else "http", self._options.host, self.port)

    @property
    def urls(self) -> list[str]:
        """Its own and its companions'."""
        return [self.url, *(companion.url for companion in self._companions)]

    def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Serve until a signal, or `stop`, ends it.

        Args:
            started: called when requests are taken.

        Raises:
            QrloraError: not everything was answered in time.
        """
        with asyncio.Runner(loop_factory=self._config.get_loop_factory()) as runner, _signals_restored():
            runner.run(self._run(started))

    def stop(self) -> None:
        """End as at SIGTERM; the second call ends at once. From any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)

    async def _run(self, started: Callable[[], None]) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        self._at_once = asyncio.Event()
        self._listen_to_signals()
        serving = asyncio.create_task(self._http.serve(sockets=[self._socket]))
        while not (self._http.started or serving.done()):
            await asyncio.sleep(STEP_S)
        for companion in self._companions:
            await companion.start()
        self._front.life.begin()
        started()
        ended = asyncio.create_task(self._ending.wait())
        await asyncio.wait([serving, ended], return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        await self._drain(serving)

    def _listen_to_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread() or self._loop is None:
            return
        for name in END:
            self._loop.add_signal_handler(getattr(signal, name), self._end)
        if hasattr(signal, RELOAD):
            self._loop.add_signal_handler(signal.SIGHUP, self._begin_reload)

    def _end(self) -> None:
        self._signals += 1
        self._ending.set()
        if self._signals > 1:
            self._at_once.set()
            self._http.force_exit = True
            self._hurried = [asyncio.ensure_future(companion.stop(0)) for companion in self._companions]

    def _begin_reload(self) -> None:
        self._reloading = asyncio.create_task(self._reloaded())

    async def _reloaded(self) -> None:
        try:
            if self._config.ssl is not None and self._options.tls is not None:
                self._config.ssl.load_cert_chain(self._options.tls.cert, self._options.tls.key)
            await asyncio.to_thread(self._reload)
            logger.warning("reloaded")
        # What was there before goes on.
        except Exception as error:
            logger.error("not reloaded: %s", error)

    async def _drain(self, serving: "asyncio.Task[None]") -> None:
        self._front.life.drain()
        try:
            async with asyncio.timeout(self._options.drain_delay_s):
                await self._at_once.wait()
        except TimeoutError:
            pass
        last = time.monotonic() + self._options.drain_s
        self._http.should_exit = True
        grace_s = 0.0 if self._at_once.is_set() else self._options.drain_s
        await asyncio.gather(serving, *(companion.stop(grace_s) for companion in self._companions))
        # Every connection has its answer by now, or its time is over.
        left_s = 0.0 if self._at_once.is_set() else max(0.0, last - time.monotonic())
        engines = [model.engine for model in self._front.models]
        done = await asyncio.gather(*(asyncio.to_thread(engine.drain, left_s) for engine in engines))
        for engine in engines:
            await asyncio.to_thread(engine.close)
        if not all(done):
            raise QrloraError(f"not everything was answered within {self._options.drain_s:g} s; raise --drain-seconds")


def make_config(front: Front, options: ServerOptions) -> uvicorn.Config:
    """uvicorn's settings, loaded.

    Raises:
        InputError: a file of TLS cannot be used.
    """
    tls, limits = options.tls, options.limits
    config = uvicorn.Config(
        make_app(front, limits),
        http=guarded_by(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=math.ceil(limits.keep_alive_s),
        timeout_graceful_shutdown=math.ceil(options.drain_s),
        ssl_certfile=tls.cert if tls else None,
        ssl_keyfile=tls.key if tls else None,
        ssl_ca_certs=str(tls.client_ca) if tls and tls.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
    )
    with library_errors(f"TLS cannot be offered with {tls and tls.cert} and {tls and tls.key}", InputError):
        config.load()
    return config


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
