"""What stands around every request: its id, how long its body may be and take, and compression."""

import asyncio
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qrlora_deploy.serving.http.encodings import WORTH_BYTES, check_encoding, chosen, deflated, inflated
from qrlora_deploy.serving.http.exchange import BODY_IS_HERE, HEADERS, REQUEST_ID, WRITE_WHOLE, Headers, WriteWhole
from qrlora_deploy.serving.http.limits import HttpLimits
from qrlora_deploy.serving.http.replies import error_reply
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.refusals import DrainingError, OverloadedError, SlowClientError, TooLargeError
from qrlora_deploy.serving.request_ids import new_request_id

ID_HEADER = b"x-request-id"
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
        headers = dict(reversed(scope["headers"]))
        given = headers.get(ID_HEADER)
        request_id = given.decode("ascii") if given is not None and GOOD_ID.fullmatch(given) else new_request_id()
        state = scope.setdefault("state", {})
        state[REQUEST_ID], state[HEADERS] = request_id, headers
        body = _Body(self, headers, receive, state.get(BODY_IS_HERE, False))
        reply = _Reply(self, headers, request_id, send, state.pop(WRITE_WHOLE, None))
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

    def __init__(self, guard: Guard, headers: Headers, receive: Receive, is_here: bool) -> None:
        self._guard, self._headers, self._receive, self._is_here = guard, headers, receive, is_here
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
        said_encoding = self._headers.get(b"content-encoding")
        encoding = "" if said_encoding is None else check_encoding(said_encoding.decode("latin-1"))
        said = self._headers.get(b"content-length", b"0")
        if not said.isdigit() or len(said) > 18 or int(said) > limit:
            raise TooLargeError(f"the body is longer than {limit} bytes; send fewer rows at a time")
        body = await (self._whole(limit) if self._is_here else self._in_time(limit))
        if encoding and body:
            # In a thread: a short body may become a long one.
            body = await asyncio.to_thread(inflated, body, encoding, limit)
            self._hold(len(body))
        return {"type": "http.request", "body": body, "more_body": False}

    async def _in_time(self, limit: int) -> bytes:
        try:
            async with asyncio.timeout(self._guard.limits.body_s):
                return await self._whole(limit)
        except TimeoutError as error:
            raise SlowClientError(f"the body did not come within {self._guard.limits.body_s:g} s") from error

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

    def __init__(
        self, guard: Guard, headers: Headers, request_id: str, send: Send, write_whole: WriteWhole | None
    ) -> None:
        self._guard, self._send, self._request_id, self._write_whole = guard, send, request_id, write_whole
        accepted = headers.get(b"accept-encoding")
        self._encoding = "" if accepted is None else chosen(accepted.decode("latin-1"))
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
            if self._is_written(start, message):
                return
            await self._send(start)
        await self._send(message)

    def _is_written(self, start: Message, message: Message) -> bool:
        """Write a reply at once, where it is whole and the server can do that."""
        if self._write_whole is None or message.get("more_body", False):
            return False
        return self._write_whole(start["status"], start["headers"], message["body"])

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
        headers.append((ID_HEADER, self._request_id.encode()))
        if self._guard.closes or start["status"] in CLOSING:
            headers.append((b"connection", b"close"))
        start["headers"] = headers
        return {**message, "body": body}
