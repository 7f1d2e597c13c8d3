"""A replica: everything that answers in one process, asked by calls and not by connections."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.endpoint import ENDED_BY
from qrlora_deploy.serving.http.limits import HttpLimits
from qrlora_deploy.serving.opened import OpenedFront
from qrlora_deploy.serving.opening import ModelPlaces, RunOptions
from qrlora_deploy.serving.ray.calls import Call, Part, Reply


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica is made of; paths are read on its own machine.

    Attributes:
        places: of the models; the first one answers where a request names none.
        run: how they run.
        keys: file of keys; None: everybody is answered.
        limits: of a body.
    """

    places: Sequence[ModelPlaces]
    run: RunOptions = field(default_factory=RunOptions)
    keys: Path | None = None
    limits: HttpLimits = field(default_factory=HttpLimits)


class Replica:
    """The application of a server, with its own queue, bounds, quotas and table of customers.

    Args:
        options: what it is made of.
        name: by which fronts know it.

    Raises:
        QrloraError: something cannot be used.
    """

    def __init__(self, options: ReplicaOptions, name: str) -> None:
        self._opened, self._name = OpenedFront(options.places, options.run, options.keys), name
        front = self._opened.front
        self._app = make_app(front, options.limits)
        front.life.begin()

    async def answer(self, call: Call) -> Reply:
        """Answer a request; every error is a reply too."""
        state: dict[str, Any] = {}
        sent: list[Message] = []
        await _ask(self._app, call, state, sent.append)
        return self._reply(sent[0], b"".join(message.get("body", b"") for message in sent[1:]), state)

    async def parts(self, call: Call) -> AsyncGenerator[Reply | Part]:
        """Answer a request as its body comes: a `Reply` with the beginning, then a `Part` for each more of it."""
        state: dict[str, Any] = {}
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        task = asyncio.create_task(_ask_to_the_end(self._app, call, state, sent))
        try:
            start = await _next(sent, task)
            yield self._reply(start, (await _next(sent, task)).get("body", b""), state)
            while (message := await sent.get()) is not None:
                yield Part(message.get("body", b"") + _waiting(sent), state.get(ENDED_BY))
            await task
        finally:
            # Whoever asked has gone, or there is nothing left.
            task.cancel()
            await asyncio.wait([task])

    def _reply(self, start: Message, body: bytes, state: dict[str, Any]) -> Reply:
        headers = tuple((name, value) for name, value in start.get("headers", ()))
        customers = tuple(state.get("customers", ()))
        return Reply(self._name, start["status"], headers, body, state.get(ENDED_BY), customers)

    def stats(self) -> dict[str, EngineStats]:
        """Counters of the engines by the model's name."""
        return {model.name: model.engine.stats() for model in self._opened.front.models}

    def queued_rows(self) -> int:
        """Rows that wait in all engines."""
        return sum(stats.queued_rows for stats in self.stats().values())

    def check(self) -> None:
        """Make sure that requests can be answered.

        Raises:
            QrloraError: an engine takes none.
        """
        for model in self._opened.front.models:
            if not model.ready:
                raise QrloraError(f"the engine of {model.name} takes no requests")

    def reload(self) -> str | None:
        """Read keys, folders and packed files again; what is wrong, in one line."""
        try:
            self._opened.reload()
        except QrloraError as error:
            return f"{self._name}: {error}"
        return None

    def close(self) -> None:
        """Let go of the customers and end the engines."""
        self._opened.front.life.drain()
        self._opened.close()


async def _ask(app: ASGIApp, call: Call, state: dict[str, Any], take: Callable[[Message], None]) -> None:
    """Hand on what an application sends for a call; `state` is the request's."""
    bodies = iter([{"type": "http.request", "body": call.body, "more_body": False}])

    async def receive() -> Message:
        # A client that has gone cancels the call, so nothing more ever comes.
        return next(bodies, None) or await asyncio.get_running_loop().create_future()

    async def send(message: Message) -> None:
        take(message)

    await app(_scope(call, state), receive, send)


async def _ask_to_the_end(
    app: ASGIApp, call: Call, state: dict[str, Any], sent: "asyncio.Queue[Message | None]"
) -> None:
    """The same, and None behind it."""
    try:
        await _ask(app, call, state, sent.put_nowait)
    finally:
        sent.put_nowait(None)


async def _next(sent: "asyncio.Queue[Message | None]", task: "asyncio.Task[None]") -> Message:
    message = await sent.get()
    if message is None:
        # It has failed before it answered.
        await task
        raise QrloraError("the application ended without an answer")
    return message


def _waiting(sent: "asyncio.Queue[Message | None]") -> bytes:
    """What was sent meanwhile: less often is quicker."""
    found = []
    while not sent.empty():
        message = sent.get_nowait()
        if message is None:
            sent.put_nowait(None)
            break
        found.append(message.get("body", b""))
    return b"".join(found)


def _scope(call: Call, state: dict[str, Any]) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
        "state": state,
    }
