"""An application on an address: uvicorn with our connections, without its signals and its logs."""

import asyncio
import math
import ssl
from contextlib import AbstractContextManager, nullcontext

import uvicorn
from starlette.types import ASGIApp

from qrlora_deploy.errors import InputError, library_errors
from qrlora_deploy.serving.addresses import at_port, bound_socket
from qrlora_deploy.serving.http.connections import LOOKS, guarded_by
from qrlora_deploy.serving.http.limits import HttpLimits
from qrlora_deploy.serving.tls import Tls

BACKLOG = 2048
STEP_S = 0.02


class _Uvicorn(uvicorn.Server):
    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Nothing: signals are the process's own."""
        return nullcontext()


class HttpListener:
    """Serves an application: a `Companion`. Its methods belong to one event loop.

    Args:
        app: what answers.
        host: where it listens.
        port: 0: any that is free.
        tls: files of certificates; None: without encryption.
        limits: of the clients.
        is_shared: other processes of this server listen there, too.

    Attributes:
        config: uvicorn's.

    Raises:
        InputError: the address is taken or none, or a file of TLS cannot be used.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Tls | None = None,
        limits: HttpLimits | None = None,
        is_shared: bool = False,
    ) -> None:
        self._host, self._tls = host, tls
        self.config = _config(app, tls, limits or HttpLimits())
        self._uvicorn = _Uvicorn(self.config)
        self._socket = bound_socket(host, port, is_shared)
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        number: int = self._socket.getsockname()[1]
        return number

    @property
    def url(self) -> str:
        """For people."""
        return f"http{'s' if self._tls else ''}://{at_port(self._host, self.port)}"

    async def start(self) -> None:
        """Begin to take connections."""
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._socket]))
        while not (self._uvicorn.started or self._serving.done()):
            await asyncio.sleep(STEP_S)
        if self._serving.done():
            self._serving.result()

    async def stop(self, grace_s: float) -> None:
        """Take no new connection, answer what was begun, and close; after `grace_s` what is left is cancelled."""
        self.config.timeout_graceful_shutdown = math.ceil(grace_s)
        # Connections that the system has taken are taken here, too: the loop comes to them in between.
        for _ in range(LOOKS):
            await asyncio.sleep(STEP_S)
        self._uvicorn.should_exit = True
        if self._serving is not None:
            await self._serving

    def hurry(self) -> None:
        """Wait no longer in `stop`."""
        self._uvicorn.force_exit = True

    def reload(self) -> None:
        """Read the files of certificates again, for connections from now on. From any thread.

        Raises:
            InputError: they cannot be used.
        """
        if self._tls is not None and self.config.ssl is not None:
            with library_errors(f"{self._tls.cert} and {self._tls.key} cannot be used", InputError):
                self.config.ssl.load_cert_chain(self._tls.cert, self._tls.key)

    def close(self) -> None:
        """Give the address back where it never started."""
        self._socket.close()


def _config(app: ASGIApp, tls: Tls | None, limits: HttpLimits) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=guarded_by(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=math.ceil(limits.keep_alive_s),
        ssl_certfile=tls.cert if tls else None,
        ssl_keyfile=tls.key if tls else None,
        ssl_ca_certs=str(tls.client_ca) if tls and tls.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
    )
    if tls is not None:
        tls.check()
    with library_errors(f"TLS cannot be offered with {tls and tls.cert} and {tls and tls.key}", InputError):
        config.load()
    return config
