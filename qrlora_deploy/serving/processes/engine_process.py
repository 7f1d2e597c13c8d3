"""The process of an engine: the models on one device, and in the first one the admin API."""

import asyncio
import logging
import threading
from functools import partial
from typing import Any

import uvicorn

from qrlora_deploy.serving.assembly import EngineParts
from qrlora_deploy.serving.garbage import calm_collector
from qrlora_deploy.serving.http.listener import HttpListener
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.processes.control import Control, Order
from qrlora_deploy.serving.processes.engine_socket import EngineSocket
from qrlora_deploy.serving.processes.options import ChildOptions

logger = logging.getLogger(__name__)

KEYS_S = 1.0
"""Between two looks whether the file of keys, which has the quotas, is another one."""

LOOK_S = 0.05


def run_engine(options: ChildOptions, control: Control) -> None:
    """Answer fronts until the supervisor ends it.

    Raises:
        QrloraError: something cannot be opened.
    """
    parts = EngineParts(options.engine_run(), control.opening)
    try:
        loops = asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory())
        with calm_collector(), loops as runner:
            runner.run(EngineProcess(options, control, parts).run())
    finally:
        parts.close()


class EngineProcess:
    """An engine's process, open.

    Args:
        options: what it is.
        control: to the supervisor.
        parts: its models, keys and quotas.
    """

    def __init__(self, options: ChildOptions, control: Control, parts: EngineParts) -> None:
        self._options, self._control, self._parts = options, control, parts
        self._life = Life()
        engines = {model.served.name: model.served.engine for model in parts.models}
        self._socket = EngineSocket(engines, options.socket_of(options.number))
        self._admin: HttpListener | None = None
        if options.server.admin_port is not None and options.number == 0:
            self._admin = parts.admin(self._life, self._reload_all, self._erased)

    async def run(self) -> None:
        """Serve."""
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        self._obey()
        await self._socket.start()
        if self._admin is not None:
            await self._admin.start()
        await self._control.start()
        self._life.begin()
        self._control.ready()
        following = asyncio.create_task(self._follow_keys())
        await self._ending.wait()
        following.cancel()
        await self._finish()

    def _obey(self) -> None:
        control = self._control
        control.stop, control.reload, control.state = self._ending.set, self._begin_reload, self._state
        control.forget, control.runs = self._forget, self._socket.runs

    def _state(self) -> dict[str, Any]:
        """What the supervisor adds up, as `messages.EngineState`."""
        stores = {name: ask() for name, ask in self._parts.stores().items()}
        writers = {
            model.served.name: model.served.writer.written() for model in self._parts.models if model.served.writer
        }
        return {"engines": self._socket.stats(), "stores": stores, "writers": writers}

    async def _finish(self) -> None:
        self._life.drain()
        drain_s = self._options.server.server.drain_s
        if self._admin is not None:
            await self._admin.stop(drain_s)
        # The supervisor ends the engines last. Where it was killed, fronts may still be finishing.
        until = self._loop.time() + drain_s
        while self._socket.fronts and self._loop.time() < until:
            await asyncio.sleep(LOOK_S)
        for engine in self._socket.engines.values():
            await asyncio.to_thread(engine.drain, 0.0)
        await self._socket.stop()

    async def _follow_keys(self) -> None:
        """Nobody asks with a key here, so nobody else looks."""
        while self._parts.keys is not None:
            await asyncio.sleep(KEYS_S)
            await asyncio.to_thread(self._parts.keys.reload)

    def _begin_reload(self) -> None:
        threading.Thread(target=self._reload, name="reload", daemon=True).start()

    def _reload(self) -> None:
        try:
            self._parts.reload()
        # What was there before goes on.
        except Exception as error:
            logger.error("not reloaded: %s", error)

    def _reload_all(self) -> None:
        """For the admin API, in a thread."""
        self._loop.call_soon_threadsafe(partial(self._control.tell, Order.RELOAD))
        self._parts.reload()

    def _erased(self, model: str, customer: str) -> None:
        """For the admin API, in a thread: the other engines forget, too."""
        self._loop.call_soon_threadsafe(partial(self._control.tell, Order.FORGOTTEN, [model, customer]))

    def _forget(self, model: str, customer: str) -> None:
        for it in self._parts.models:
            if it.served.name == model:
                threading.Thread(target=it.unload, args=(customer,), name="forget", daemon=True).start()
