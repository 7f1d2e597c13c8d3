"""The process that a user starts: it starts engines and fronts, starts again what fails, and ends all in order."""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.io.temporary import scratch_folder
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.serving.addresses import at_port, bound_socket
from qrlora_deploy.serving.assembly import AssemblyOptions
from qrlora_deploy.serving.processes.children import Child
from qrlora_deploy.serving.processes.control import Order
from qrlora_deploy.serving.processes.gathering import Gathering
from qrlora_deploy.serving.processes.heartbeat import kill_if_it_hangs, kill_if_it_never_opens
from qrlora_deploy.serving.processes.options import ENGINE, FRONT, ChildOptions

AGAIN_S = 600.0
"""An engine that fails twice within so long is not started a third time: the server ends. One that says that it cannot
open what it needs is started again and again for so long."""

PAUSE_S = 0.2
"""From the end of a front to its next start; longer, up to `PAUSE_MAX_S`, where it cannot begin again and again."""

PAUSE_MAX_S = 5.0

GRACE_S = 10.0
"""Beyond the time for draining, after which a process that does not end is killed."""

logger = logging.getLogger(__name__)


LONGEST_SOCKET = 103
"""Bytes of a socket's path: Linux takes 107, macOS 103."""


class Supervisor:
    """A server of several processes.

    Args:
        options: what it is made of; `processes` is at least 1.
        log_json: logs are lines of JSON.

    Attributes:
        url: where it listens.
        ports: of the companions, by what they are called.

    Raises:
        InputError: an address is taken or none, or there is no such device.
    """

    def __init__(self, options: AssemblyOptions, log_json: bool = False) -> None:
        self._devices = list(options.devices) or [options.run.provider]
        for device in self._devices:
            # Said at once, and not by a process once it has opened everything else.
            Device.of(device)
        self._log_json = log_json
        self._held: list[socket.socket] = []
        server = options.server
        port = self._hold(server.host, server.port)
        self.url = f"http{'s' if server.tls else ''}://{at_port(server.host, port)}"
        self.ports: dict[str, int] = {}
        if options.grpc_port is not None:
            self.ports["gRPC"] = self._hold(server.host, options.grpc_port)
        if options.admin_port is not None:
            self.ports["admin API"] = self._hold(options.admin_host, options.admin_port)
        self._options = replace(
            options,
            server=replace(server, port=port, is_shared=True),
            grpc_port=self.ports.get("gRPC"),
            admin_port=self.ports.get("admin API"),
        )
        self._children: list[Child] = []
        self._away_since: dict[int, float] = {}
        self._failure: QrloraError | None = None
        self._signals = 0

    def _hold(self, host: str, port: int) -> int:
        """Keep a port for the processes; none of this one's sockets ever listens."""
        if port:
            # Another server that shares its port would share its clients, too.
            bound_socket(host, port).close()
        self._held.append(bound_socket(host, port, is_shared=True))
        return int(self._held[-1].getsockname()[1])

    def run(self, started: Callable[[], None]) -> None:
        """Serve until a signal ends it.

        Args:
            started: called when requests are taken.

        Raises:
            QrloraError: a process cannot start, an engine failed twice, or not everything was answered in time.
        """
        try:
            with scratch_folder() as folder:
                _check_length(folder)
                asyncio.run(self._run(folder, started))
        finally:
            for held in self._held:
                held.close()
        if self._failure is not None:
            raise self._failure

    async def _run(self, folder: Path, started: Callable[[], None]) -> None:
        self._folder, self._ending = folder, asyncio.Event()
        self._options = replace(self._options, kept_keys=folder / "keys.json")
        self.gathering = Gathering(self._options.counted)
        following = asyncio.create_task(self.gathering.follow())
        with self._obeying_signals():
            try:
                await self._start_all()
                if not self._ending.is_set():
                    started()
                await self._ending.wait()
            finally:
                await self._finish()
                following.cancel()

    async def _start_all(self) -> None:
        for number in range(len(self._devices)):
            self._start(ENGINE, number)
        for number in range(self._options.processes):
            self._start(FRONT, number)
        ready = [asyncio.create_task(child.ready.wait()) for child in self._children]
        ending = asyncio.create_task(self._ending.wait())
        while any(not it.done() for it in ready) and not ending.done():
            await asyncio.wait((*ready, ending), return_when=asyncio.FIRST_COMPLETED)
            ready = [it for it in ready if not it.done()]
        for it in (*ready, ending):
            it.cancel()

    def _start(self, role: str, number: int, times: int = 0) -> None:
        """Start a process; `times` says how often it has failed of late."""
        options = ChildOptions(role, number, self._folder, self._options, self._devices, self._log_json)
        child = Child(options, self._received, times)
        self._children.append(child)
        self.gathering.children = self._children
        child.watching = asyncio.create_task(self._watch(child))

    async def _watch(self, child: Child) -> None:
        """Follow a process to its end."""
        begin_s = time.monotonic()
        feeling = asyncio.create_task(self._feel(child))
        how = await child.run()
        feeling.cancel()
        self._children.remove(child)
        if self._ending.is_set():
            if how and child.was_ready and self._failure is None:
                self._failure = child.failure or QrloraError(f"{child.name} {how} while the server ended")
            return
        if not child.was_ready and child.times == 0:
            self._fail(child, how)
            return
        logger.error("%s %s", child.name, child.failure or how or "ended")
        if child.options.role == ENGINE:
            await self._engine_ended(child, how, time.monotonic() - begin_s)
        else:
            await self._start_later(child)

    async def _feel(self, child: Child) -> None:
        """Kill a process that does not open, or hangs later."""
        await kill_if_it_never_opens(child, self._options.open_s, self._ending)
        await kill_if_it_hangs(child, self._options.hang_s, self._ending)

    async def _start_later(self, child: Child) -> None:
        """Start a process again after a pause, which is longer where it cannot begin."""
        await asyncio.sleep(min(PAUSE_MAX_S, PAUSE_S * 2**child.times))
        if not self._ending.is_set():
            self._start(child.options.role, child.options.number, 1 if child.was_ready else child.times + 1)

    async def _engine_ended(self, child: Child, how: str, lived_s: float) -> None:
        now, number = time.monotonic(), child.options.number
        if child.was_ready:
            self._away_since[number] = now
        elif child.failure is not None and now - self._away_since[number] < AGAIN_S:
            # It said what it lacks, such as a file that is being written or a store that is down.
            await self._start_later(child)
            return
        if child.times and (lived_s < AGAIN_S or not child.was_ready):
            self._fail(child, how, f"for the second time within {AGAIN_S:g} s")
            return
        logger.error("%s is started again; until it is ready, requests are refused", child.name)
        self._start(ENGINE, child.options.number, 1)

    def _fail(self, child: Child, how: str, when: str = "") -> None:
        while_opening = f"while it opened {child.opening[1].rstrip(',')}" if child.opening[1] else "before it was ready"
        self._failure = child.failure or QrloraError(
            f"{child.name} {how or 'ended'} {when or while_opening}; the server ends"
        )
        self._ending.set()

    def _received(self, child: Child, kind: int, number: int, payload: bytearray) -> None:
        """A process tells what concerns others."""
        if kind == Order.RELOAD:
            self._tell(Order.RELOAD, but=child)
        elif kind == Order.FORGOTTEN:
            for other in self._of(ENGINE):
                if other is not child:
                    other.tell(Order.FORGET, 0, bytes(payload))
        else:
            self.gathering.received(child, kind, number, payload)

    def _of(self, role: str) -> list[Child]:
        return [child for child in self._children if child.options.role == role]

    def _tell(self, order: Order, but: Child | None = None) -> None:
        for child in self._children:
            if child is not but:
                child.tell(order)

    async def _finish(self) -> None:
        """End the fronts, which answer what was begun, and then the engines."""
        self._ending.set()
        server = self._options.server
        for child in self._children:
            if not child.was_ready:
                # It has nothing to finish.
                child.kill()
        fronts = self._of(FRONT)
        for child in fronts:
            child.tell(Order.STOP)
            if self._failure is not None:
                # At once: nobody can answer what they wait for.
                child.tell(Order.STOP)
        patience_s = server.drain_delay_s + server.drain_s + GRACE_S if self._failure is None else GRACE_S
        await _ended(fronts, patience_s)
        engines = self._of(ENGINE)
        for child in engines:
            child.tell(Order.STOP)
        await _ended(engines, GRACE_S)

    @contextmanager
    def _obeying_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handlers: dict[int, Callable[[], object]] = {
            signal.SIGINT: self._end,
            signal.SIGTERM: self._end,
            signal.SIGHUP: partial(self._tell, Order.RELOAD),
        }
        try:
            for number, handler in handlers.items():
                loop.add_signal_handler(number, handler)
        except (ValueError, RuntimeError) as error:
            raise InputError("a server of several processes runs in the main thread of its process") from error
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        self._signals += 1
        self._ending.set()
        if self._signals > 1:
            for child in self._of(FRONT):
                child.tell(Order.STOP)


async def _ended(children: list[Child], patience_s: float) -> None:
    """Wait until processes have ended; kill those that take too long."""
    tasks = [child.watching for child in children if child.watching is not None]
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=patience_s)
        for child in children:
            if child.watching in late:
                logger.error("%s does not end and is killed", child.name)
                child.kill()
        if late:
            await asyncio.wait(late)


def _check_length(folder: Path) -> None:
    """Sockets lie in `folder`, and the system takes no long paths for them."""
    room = LONGEST_SOCKET - len(os.fsencode(folder)) - len("/engine-999.sock")
    if room < 0:
        raise InputError(
            f"the folder of temporary files, {folder.parent}, has a path that is {-room} bytes too long for sockets; "
            "set TMPDIR to a shorter one"
        )
