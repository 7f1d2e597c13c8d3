"""What the routes of the front have in common: the key, errors as replies, and counting."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.access import Access, open_access
from qrlora_deploy.serving.http.exchange import HEADERS, REQUEST_ID
from qrlora_deploy.serving.http.replies import error_reply, reply_to_error
from qrlora_deploy.serving.parts import Metrics, Spans
from qrlora_deploy.serving.refusals import GONE, DrainingError, reason_of

GIVE_UP = "give_up"
"""In the state of a request: what to call when its client has gone; `GONE` is there then."""

SPANS = "spans"
"""In the state of a request: its spans, if there are any."""

CUSTOMERS = "customers"
"""In the state of a request: those of its rows, as far as it was read."""

STATUS_CODE = "http.response.status_code"

TIMEOUT = "x-request-timeout-ms"
"""The header by which a client says how long it waits."""

ENDED_BY = "ended_by"
"""In the state of a request: the kind of the error that it ended with."""

CLIENT_GONE = 499
"""The usual status, in logs and metrics, of a request whose client did not wait. Nobody gets it."""

Handler = Callable[[Request, Access], Awaitable[Response]]

Errors = Callable[[Exception, str], Response]
"""Make the reply of an error, with the request's id."""


class Outcome(NamedTuple):
    """How a request ended.

    Attributes:
        code: of the reply.
        seconds: from its arrival to the reply.
        key_id: of the key that came with it.
        reason: why it was not answered; empty: it was.
    """

    code: int
    seconds: float
    key_id: str
    reason: str


class Asked(Protocol):
    """Whose routes they are."""

    def access(self, request: Request) -> Access:
        """What a request's key may do."""

    def begin_spans(self, request: Request, endpoint: "Endpoint") -> Spans | None:
        """The spans of a request; None: nobody wants them."""

    def tell(self, request: Request, outcome: Outcome, endpoint: "Endpoint") -> None:
        """A request has ended."""


@dataclass(frozen=True)
class Endpoint:
    """An ASGI application of one route.

    Attributes:
        front: whose route it is.
        path: pattern.
        handler: answers.
        is_open: without a key, too.
        asks: it asks a model, and counts as a request on the live page.
        errors: makes the reply of an error, with the request's id.
    """

    front: Asked
    path: str
    handler: Handler
    is_open: bool = False
    asks: bool = False
    errors: Errors = reply_to_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request, start, access, reason = Request(scope, receive, send), time.perf_counter(), open_access, ""
        spans = self.front.begin_spans(request, self) if self.asks else None
        try:
            access = open_access if self.is_open else self.front.access(request)
            reply = await self.handler(request, access)
            # Of an answer that is another server's.
            reason = scope["state"].get(ENDED_BY) or ""
        except Exception as error:
            scope["state"][ENDED_BY] = getattr(error, "kind", QrloraError.kind)
            reply, reason = self.errors(error, request_id_of(request)), reason_of(error)
        except asyncio.CancelledError:
            if not scope["state"].get(GONE):
                _end(spans, DrainingError.kind, 503)
                raise
            reply, reason = error_reply("the client has gone", CLIENT_GONE), GONE
        scope["state"].pop(GIVE_UP, None)
        lasts = isinstance(reply, StreamingResponse)
        if not lasts:
            self._tell(request, reply, start, access, reason)
        try:
            await reply(scope, receive, send)
        finally:
            if lasts:
                # How a stream ends is known at its end.
                reason = GONE if scope["state"].get(GONE) else scope["state"].get(ENDED_BY) or reason
                self._tell(request, reply, start, access, reason)
            _end(spans, reason, reply.status_code)

    def _tell(self, request: Request, reply: Response, start: float, access: Access, reason: str) -> None:
        outcome = Outcome(reply.status_code, time.perf_counter() - start, access.key_id, reason)
        self.front.tell(request, outcome, self)


def _end(spans: Spans | None, reason: str, code: int) -> None:
    if spans is not None:
        spans.end(reason, code >= 500, {STATUS_CODE: code})


def customers_of(request: Request) -> Sequence[str | None]:
    """Of the rows that a request asks for, as far as it was read."""
    found: Sequence[str | None] = request.scope["state"].get(CUSTOMERS, ())
    return found


def spans_of(request: Request) -> Spans | None:
    """The spans that its endpoint has begun."""
    found: Spans | None = request.scope["state"].get(SPANS)
    return found


def request_id_of(request: Request) -> str:
    """The client's own id, or the one that was made up."""
    found: str = request.scope["state"].get(REQUEST_ID, "-")
    return found


def header_of(request: Request, name: str) -> str | None:
    """The value of a header; None where there is none. starlette looks through all of them for each."""
    value: bytes | None = request.scope["state"][HEADERS].get(name.encode())
    return None if value is None else value.decode("latin-1")


async def scraped(metrics: Metrics, request: Request, access: Access) -> Response:
    """For Prometheus."""
    return Response(await metrics.scrape(), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})
