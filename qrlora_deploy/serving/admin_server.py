"""The admin API on a port of its own, beside a server's others."""

import asyncio
from dataclasses import replace

from qrlora_deploy.serving.admin import Admin, make_admin_app
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.server import STEP_S, HttpServer, ServerOptions, listen, make_config


class AdminServer:
    """A companion of a `Server`, which begins and ends with it.

    Args:
        admin: what is changed.
        options: of the server; address and TLS are the same.
        port: 0: any that is free.

    Raises:
        InputError: the port is taken, or a file of TLS cannot be used.
    """

    def __init__(self, admin: Admin, options: ServerOptions, port: int) -> None:
        self._life = Life()
        config = make_config(make_admin_app(admin, self._life), replace(options, port=port))
        self._http = HttpServer(config)
        self._socket = listen(options.host, port)
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        number: int = self._socket.getsockname()[1]
        return number

    async def start(self) -> None:
        """Begin to listen."""
        self._serving = asyncio.create_task(self._http.serve(sockets=[self._socket]))
        while not (self._http.started or self._serving.done()):
            await asyncio.sleep(STEP_S)

    async def serving(self) -> None:
        """Nothing: it is no part of what is asked for readiness."""
        self._life.begin()

    async def not_serving(self) -> None:
        """Keep no connection from now on."""
        self._life.drain()

    async def close(self, timeout_s: float) -> bool:
        """Take nobody new and finish what was begun within so many seconds; whether all of it was."""
        self._http.should_exit = True
        if self._serving is None:
            return True
        done, _ = await asyncio.wait([self._serving], timeout=timeout_s)
        if not done:
            self._http.force_exit = True
            await self._serving
        return bool(done)
