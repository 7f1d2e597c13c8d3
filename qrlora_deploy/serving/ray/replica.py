"""A replica: everything that answers in one process, asked by calls and not by connections."""

import asyncio
from collections.abc import Sequence
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
from qrlora_deploy.serving.ray.calls import Call, Reply


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
        sent = await _asked(self._app, call, state)
        start = sent[0]
        return Reply(
            self._name,
            start["status"],
            tuple((name, value) for name, value in start.get("headers", ())),
            b"".join(message.get("body", b"") for message in sent[1:]),
            state.get(ENDED_BY),
            tuple(state.get("customers", ())),
        )

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


async def _asked(app: ASGIApp, call: Call, state: dict[str, Any]) -> list[Message]:
    """What an application sends for a call; `state` is the request's."""
    bodies = iter([{"type": "http.request", "body": call.body, "more_body": False}])
    sent: list[Message] = []

    async def receive() -> Message:
        # A client that has gone cancels the call, so nothing more ever comes.
        return next(bodies, None) or await asyncio.get_running_loop().create_future()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(_scope(call, state), receive, send)
    return sent


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
