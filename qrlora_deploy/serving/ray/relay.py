"""The front of replicas that are elsewhere: the same routes, each request asked of the replica that it belongs to."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from prometheus_client import Counter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.access import Access
from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.http.completions import EVENTS, stream_error
from qrlora_deploy.serving.http.endpoint import ENDED_BY
from qrlora_deploy.serving.http.front import GIVE_UP, HEADER_LENGTH, TIMEOUT, Front, Handler
from qrlora_deploy.serving.http.live_page import Shown
from qrlora_deploy.serving.http.replies import json_reply
from qrlora_deploy.serving.inference.questions import deadline_of
from qrlora_deploy.serving.live.totals import RequestCounts
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.parts import Keys
from qrlora_deploy.serving.ray.calls import Begun, Call, Headers, Part, Reply, begin
from qrlora_deploy.serving.ray.totals import ReplicasWindow, Totals
from qrlora_deploy.serving.ray.whose import customer_of
from qrlora_deploy.serving.refusals import DeadlineError, DrainingError, LostError, OverloadedError, reason_of
from qrlora_deploy.serving.served import Models

T = TypeVar("T")

TEXT = ("/v1/completions", "/v1/chat/completions")
"""Paths whose answers may come as a stream."""

READY_S = 5.0
"""For a replica to say that it is ready."""

BUSY = (OverloadedError.kind, DrainingError.kind)
"""Refusals that another replica may not share. A quota is none of them: it would be as many quotas as replicas."""

OF_THE_CONNECTION = frozenset({b"accept-encoding", b"connection", b"content-encoding", b"content-length", b"expect",
                               b"transfer-encoding", b"upgrade", b"x-request-id"})  # fmt: skip
"""Headers that the front has dealt with, or writes itself."""


class Replicas(Protocol):
    """The replicas, wherever they are."""

    async def ask(self, call: Call) -> Reply:
        """Ask the replica that a call belongs to.

        Raises:
            LostError: it ended meanwhile.
            OverloadedError: all are busy, and as many calls wait for one as may.
            DrainingError: there are none.
        """

    def parts(self, call: Call) -> AsyncGenerator[Reply | Part]:
        """The same, as the answer comes: a `Reply` with its beginning, then what follows. Raises as `ask`."""

    async def stats(self) -> Sequence[Mapping[str, EngineStats]]:
        """Counters of every replica by the model's name."""


class NoModels(Models):
    """Models of a process that has none of its own."""

    def __init__(self) -> None:
        self._models = {}


class RelayFront(Front):
    """Answers by asking replicas.

    A request whose replica ended, or refused it for load, is asked once more of the next one: answering changes
    nothing, so it may be done twice.

    Args:
        replicas: who answers.
        keys: who may ask anything at all; replicas look up what a key may ask. None: everybody.
        counted: customers whose rows metrics tell by name.
    """

    def __init__(self, replicas: Replicas, keys: Keys | None = None, counted: Iterable[str] = ()) -> None:
        self._replicas = replicas
        self._totals = Totals()
        metrics = Metrics(self._totals, counted)
        self._again = Counter(
            "qrlora_asked_again",
            "Requests that another replica was asked.",
            ["reason"],
            registry=metrics.registry,
        )
        counts = RequestCounts()
        window = ReplicasWindow(counts.totals, self._totals, replicas.stats)
        super().__init__(NoModels(), keys=keys, metrics=metrics, counts=counts, window=window)

    @property
    def shown(self) -> Iterable[Shown]:
        """Models of the replicas."""
        return self._totals

    def _route(self, path: str, method: str, handler: Handler, **options: Any) -> Route:
        if path == "/metrics":
            handler = partial(self._scrape, handler)
        elif path.startswith(("/v1/", "/v2")) and not path.startswith("/v2/health/"):
            handler = self.relay
        return super()._route(path, method, handler, **options)

    async def ready(self, request: Request, access: Access) -> Response:
        """Requests are welcome, and a replica would answer."""
        ready = self.life.ready and await self._one_is_ready()
        return json_reply({"ready": ready}, 200 if ready else 503)

    async def _one_is_ready(self) -> bool:
        try:
            async with asyncio.timeout(READY_S):
                return (await self._replicas.ask(Call("GET", "/v2/health/ready"))).status == 200
        except (TimeoutError, QrloraError):
            return False

    async def _scrape(self, scrape: Handler, request: Request, access: Access) -> Response:
        """Requests of this front, and the engines of all replicas together."""
        self._totals.take(await self._replicas.stats())
        return await scrape(request, access)

    async def relay(self, request: Request, access: Access) -> Response:
        """Ask a replica."""
        body = await request.body()
        customer = customer_of(body, request.headers.get(HEADER_LENGTH)) if request.method == "POST" else None
        call = Call(request.method, request.url.path, _headers(request.headers.raw), body, customer)
        task = asyncio.current_task()
        if task is not None:
            request.scope["state"][GIVE_UP] = task.cancel
        self.life.check()
        deadline_s = deadline_of(request.headers.get(TIMEOUT))
        if request.url.path in TEXT:
            return await self._text(call, request, deadline_s)
        reply = await _in_time(self._twice(call, self._replicas.ask, _itself), deadline_s)
        return _replied(reply, request, Response(reply.body, reply.status))

    async def _text(self, call: Call, request: Request, deadline_s: float | None) -> Response:
        """Text, which may come as a stream."""

        async def ask(call: Call) -> Begun:
            return await begin(self._replicas.parts(call))

        begun = await _in_time(self._twice(call, ask, lambda begun: begun.reply), deadline_s)
        reply = begun.reply
        if dict(reply.headers).get(b"content-type", b"").startswith(EVENTS.encode()):
            return _replied(reply, request, StreamingResponse(_following(begun, request), reply.status))
        rest = [part.body async for part in begun.rest]
        return _replied(reply, request, Response(b"".join([reply.body, *rest]), reply.status))

    async def _twice(self, call: Call, ask: Callable[[Call], Awaitable[T]], reply_of: Callable[[T], Reply]) -> T:
        try:
            found = await ask(call)
        except LostError as error:
            self._again.labels(error.kind).inc()
            return await ask(call)
        reply = reply_of(found)
        if reply.refusal not in BUSY:
            return found
        self._again.labels(reply.refusal).inc()
        return await ask(replace(call, avoid=(reply.replica,)))


def _itself(reply: Reply) -> Reply:
    return reply


def _replied(reply: Reply, request: Request, response: Response) -> Response:
    """The response for what a replica has answered, with what is told of it."""
    request.state.customers = reply.customers
    request.scope["state"][ENDED_BY] = reply.refusal
    response.raw_headers = list(_headers(reply.headers))
    return response


async def _following(begun: Begun, request: Request) -> AsyncIterator[bytes]:
    """A stream to its end; a replica that ends before is an error within it, as its status has been told."""
    async with aclosing(begun.rest):
        yield begun.reply.body
        try:
            async for part in begun.rest:
                request.scope["state"][ENDED_BY] = part.refusal
                yield part.body
        except QrloraError as error:
            request.scope["state"][ENDED_BY] = reason_of(error)
            yield stream_error(error)


def _headers(pairs: Iterable[tuple[bytes, bytes]]) -> Headers:
    return tuple((name, value) for name, value in pairs if name not in OF_THE_CONNECTION)


async def _in_time(waiting: Awaitable[T], deadline_s: float | None) -> T:
    if deadline_s is None:
        return await waiting
    try:
        async with asyncio.timeout(deadline_s - time.monotonic()):
            return await waiting
    except TimeoutError as error:
        raise DeadlineError("the request's time passed before it was answered") from error
