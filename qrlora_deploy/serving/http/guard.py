"""What stands around every request: its id, how long its body may be and take, and compression."""

import asyncio
import re
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qrlora_deploy.serving.http.encodings import WORTH_BYTES, check_encoding, chosen, deflated, inflated
from qrlora_deploy.serving.http.limits import HttpLimits
from qrlora_deploy.serving.http.replies import error_reply
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.refusals import DrainingError, OverloadedError, SlowClientError, TooLargeError
from qrlora_deploy.serving.request_ids import new_request_id

REQUEST_ID = b"x-request-id"
GOOD_ID = re.compile(rb"[\x21-\x7e]{1,128}")

LONG_BYTES = 64 * 1024
"""Replies that are longer take milliseconds to compress, so a thread does it."""

CLOSING = (408, 413)
"""After these the rest of a body may still come, and nobody reads it."""


class Guard:
    """ASGI middleware. A body is read when the application asks for it, which looks at the key before.

    Args:
        app: what is guarded.
        life: of the server; once it drains, no connection is kept.
        limits: what a client may take.
    """

    def __init__(self, app: ASGIApp, life: Life, limits: HttpLimits | None = None) -> None:
        self._app, self._life, self._limits = app, life, limits or HttpLimits()
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(REQUEST_ID, b"")
        if not GOOD_ID.fullmatch(request_id):
            request_id = new_request_id().encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode("ascii")
        body, reply = _Body(self, headers, receive), _Reply(self, headers, request_id, send)
        try:
            await self._app(scope, body.receive, reply.send)
        except asyncio.CancelledError:
            # Of a server that ends: its time for what was begun is over.
            if reply.begun or not self.closes:
                raise
            await error_reply("the server ends; try again soon", 503, 1.0)(scope, receive, reply.send)
        finally:
            self._held -= body.held

    def hold(self, size: int) -> None:
        """Count bytes of bodies.

        Raises:
            OverloadedError: all bodies together are too long.
        """
        if self._held + size > self._limits.max_bodies_bytes:
            raise OverloadedError("the server holds as many bodies as it may; try again soon")
        self._held += size

    @property
    def limits(self) -> HttpLimits:
        """What a client may take."""
        return self._limits

    @property
    def closes(self) -> bool:
        """Whether connections end with the reply."""
        return self._life.draining


class _Body:
    """A request's body, read whole at the first call of `receive`.

    Attributes:
        held: bytes of it that the guard counts.
    """

    def __init__(self, guard: Guard, headers: Mapping[bytes, bytes], receive: Receive) -> None:
        self._guard, self._headers, self._receive = guard, headers, receive
        self._done = False
        self.held = 0

    async def receive(self) -> Message:
        """The body in one message.

        Raises:
            TooLargeError: it is over its bound.
            SlowClientError: it took too long, or the client has gone.
            DrainingError: the server ends, and the connection has been ended.
            MalformedInputError: it is not compressed as it says.
            OverloadedError: there are too many bodies.
        """
        if self._done:
            return await self._receive()
        self._done = True
        limit = self._guard.limits.max_body_bytes
        encoding = check_encoding(self._headers.get(b"content-encoding", b"").decode("latin-1"))
        said = self._headers.get(b"content-length", b"0")
        if not said.isdigit() or len(said) > 18 or int(said) > limit:
            raise TooLargeError(f"the body is longer than {limit} bytes; send fewer rows at a time")
        try:
            async with asyncio.timeout(self._guard.limits.body_s):
                body = await self._whole(limit)
        except TimeoutError as error:
            raise SlowClientError(f"the body did not come within {self._guard.limits.body_s:g} s") from error
        if encoding and body:
            # In a thread: a short body may become a long one.
            body = await asyncio.to_thread(inflated, body, encoding, limit)
            self._hold(len(body))
        return {"type": "http.request", "body": body, "more_body": False}

    async def _whole(self, limit: int) -> bytes:
        message = await self._receive()
        pieces: list[bytes] = []
        size = 0
        while message["type"] == "http.request":
            piece = message.get("body", b"")
            size += len(piece)
            if size > limit:
                raise TooLargeError(f"the body is longer than {limit} bytes; send fewer rows at a time")
            self._hold(len(piece))
            pieces.append(piece)
            if not message.get("more_body", False):
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)
            message = await self._receive()
        if self._guard.closes:
            raise DrainingError("the server ends, and the body was not whole in time; try again soon")
        raise SlowClientError("the client has gone before its body was whole")

    def _hold(self, size: int) -> None:
        self._guard.hold(size)
        self.held += size


class _Reply:
    """A reply on its way out: with the request's id, compressed where the client takes that.

    Attributes:
        begun: its head has been sent.
    """

    def __init__(self, guard: Guard, headers: Mapping[bytes, bytes], request_id: bytes, send: Send) -> None:
        self._guard, self._send, self._request_id = guard, send, request_id
        self._encoding = chosen(headers.get(b"accept-encoding", b"").decode("latin-1"))
        self._start: Message | None = None
        self.begun = False

    async def send(self, message: Message) -> None:
        """Send the start together with the body, whose length decides what the headers are."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        start, self._start = self._start, None
        if start is not None:
            message = await self._finished(start, message)
            self.begun = True
            await self._send(start)
        await self._send(message)

    async def _finished(self, start: Message, message: Message) -> Message:
        headers = [pair for pair in start.get("headers", []) if pair[0] != b"content-length"]
        body = message.get("body", b"")
        if not message.get("more_body", False):
            if self._encoding and len(body) >= WORTH_BYTES:
                if len(body) > LONG_BYTES:
                    body = await asyncio.to_thread(deflated, body, self._encoding)
                else:
                    body = deflated(body, self._encoding)
                headers += [(b"content-encoding", self._encoding.encode()), (b"vary", b"accept-encoding")]
            headers.append((b"content-length", str(len(body)).encode()))
        headers.append((REQUEST_ID, self._request_id))
        if self._guard.closes or start["status"] in CLOSING:
            headers.append((b"connection", b"close"))
        start["headers"] = headers
        return {**message, "body": body}
