"""A process of a server, seen from the supervisor."""

import asyncio
import signal
import socket
from collections.abc import Callable

from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.serving.processes.control import Order
from qrlora_deploy.serving.processes.links import Link, record_of
from qrlora_deploy.serving.processes.options import ChildOptions, command, environment

STDERR = 2


class Child:
    """A process and the connection to it. It belongs to one event loop.

    Args:
        options: what it is.
        received: called with this, and each frame that is for others.
        times: how often its like has failed of late.

    Attributes:
        ready: set when it does its work.
        failure: what it said before it ended.
        watching: the task that follows it.
        opening: number and name of what it opens; "": nothing.
        pulse: what it said of itself last, as `Control.runs`; None: nothing since it was asked.
    """

    def __init__(
        self, options: ChildOptions, received: "Callable[[Child, int, int, bytearray], None]", times: int = 0
    ) -> None:
        self.options, self.times = options, times
        self._received = received
        self._link: Link | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.ready, self._lost = asyncio.Event(), asyncio.Event()
        self.failure: QrloraError | None = None
        self.watching: asyncio.Task[None] | None = None
        self.opening = (0, "")
        self.pulse: dict[str, int] | None = None
        self._killed_for = ""

    @property
    def name(self) -> str:
        """For people."""
        pid = f" (process {self._process.pid})" if self._process is not None else ""
        return f"{self.options.name}{pid}"

    @property
    def was_ready(self) -> bool:
        """Whether it ever did its work."""
        return self.ready.is_set()

    async def run(self) -> str:
        """Start it and wait for its end; how it ended, in words, empty where all was well."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            _, self._link = await asyncio.get_running_loop().create_unix_connection(
                lambda: Link(self._frame, lambda link: self._lost.set()), sock=ours
            )
            self._process = await asyncio.create_subprocess_exec(
                *command(self.options, theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=STDERR,
                env=environment(),
                start_new_session=True,
            )
        code = await self._process.wait()
        # What it said last may still be on its way.
        await self._lost.wait()
        if self._killed_for:
            return f"{self._killed_for} and was killed"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with the code {code}" if code else ""

    def tell(self, order: Order, number: int = 0, payload: bytes = b"") -> None:
        """Send a frame; nothing where it has gone."""
        if self._link is not None:
            self._link.send(order, number, payload)

    def ask_pulse(self) -> None:
        """Have it say that it is alive; `pulse` is set when it does."""
        self.pulse = None
        self.tell(Order.PING)

    def kill(self, what_it_did: str = "") -> None:
        """End it at once, for something that it did or did not do."""
        if self._process is not None and self._process.returncode is None:
            self._killed_for = what_it_did
            self._process.kill()

    def _frame(self, link: Link, kind: int, number: int, payload: bytearray) -> None:
        if kind == Order.READY:
            self.ready.set()
        elif kind == Order.OPENING:
            self.opening = (self.opening[0] + 1, record_of(payload))
        elif kind == Order.PONG:
            self.pulse = record_of(payload)
        elif kind == Order.FAILED:
            message, code = record_of(payload)
            self.failure = (InputError if code == InputError.exit_code else QrloraError)(message)
        else:
            self._received(self, kind, number, payload)
