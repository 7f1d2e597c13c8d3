"""Connections: how many, how long a client may take for its headers, and how long those may be.

uvicorn begins with the application when the headers are whole, so what comes before is bounded here.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from qrlora_deploy.serving.http.endpoint import GIVE_UP
from qrlora_deploy.serving.http.exchange import BODY_IS_HERE, WRITE_WHOLE
from qrlora_deploy.serving.http.limits import HttpLimits
from qrlora_deploy.serving.refusals import GONE

PER_HEADER = 32
"""Bytes that a header counts beside its own: very many empty ones take memory too."""

LOOKS, LOOK_S = 4, 0.03
"""Before an idle connection is ended by a server that ends: what arrived before that is read in between, on a busy
machine, too, where one look may come as late as the next one."""

LINGER_S = 5.0
"""For a client to take the line that refuses it."""


class HeadTooLong(Exception):
    """Raised in a callback of the parser, which ends the connection."""


class GuardedProtocol(HttpToolsProtocol):
    """A connection. `guarded_by` gives the class with its limits."""

    http_limits = HttpLimits()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._in_head, self._head_bytes, self._fed = True, 0, 0
        self._most_head_bytes = self.http_limits.max_head_bytes
        self._head_timer: asyncio.TimerHandle | None = None
        self._reply_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._running: RequestResponseCycle | None = None
        self._refusal = (400, "this is no HTTP request")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.http_limits.max_connections:
            self._refuse(503, "there are too many connections; try again soon")
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end; what is being answered is given up, and its rows that still wait are not run."""
        self._forget_timer()
        if self._end_timer is not None:
            self._end_timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            # uvicorn tells the request that came last, which may still wait behind this one.
            self._running.disconnected = True
            self._running.message_event.set()
            state = self._running.scope["state"]
            state[GONE] = True
            if GIVE_UP in state:
                state[GIVE_UP]()

    def pause_writing(self) -> None:
        """The client does not take its replies; after a while it gets no more of them."""
        super().pause_writing()
        if self._reply_timer is None:
            self._reply_timer = self.loop.call_later(self.http_limits.reply_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It does."""
        if self._reply_timer is not None:
            self._reply_timer.cancel()
            self._reply_timer = None
        super().resume_writing()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        cycle.scope["state"][WRITE_WHOLE] = partial(self._write_whole, cycle)
        super()._start_asgi_task(cycle, app)

    def _write_whole(
        self, cycle: RequestResponseCycle, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> bool:
        """As `WriteWhole`, of a reply after which the connection goes on."""
        if self.flow.write_paused or cycle.disconnected or cycle.response_started or not cycle.keep_alive:
            return False
        if cycle.scope["method"] == "HEAD" or (b"connection", b"close") in headers:
            return False
        head = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            head += (name, b": ", value, b"\r\n")
        cycle.response_started = cycle.response_complete = True
        self.transport.write(b"".join((*head, b"\r\n", body)))
        cycle.message_event.set()
        cycle.on_response()
        return True

    def data_received(self, data: bytes) -> None:
        """Parse what came; a head that does not end is refused before it is whole."""
        if self.transport.is_closing():
            return
        if self._in_head:
            self._fed += len(data)
        super().data_received(data)
        if self._in_head and self._fed and not self.transport.is_closing():
            self._wait_for_the_rest()

    def _wait_for_the_rest(self) -> None:
        """Of a head that is not whole yet."""
        if self._fed > self._most_head_bytes:
            self._refuse(431, f"the headers are longer than {self._most_head_bytes} bytes")
        elif self._head_timer is None:
            self._await_head()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        # As `_count` and uvicorn's own, without calls: a request has many headers.
        self._head_bytes += len(name) + len(value) + PER_HEADER
        if self._head_bytes > self._most_head_bytes:
            self._head_is_long()
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The application begins."""
        self._in_head, self._fed = False, 0
        self._forget_timer()
        try:
            super().on_headers_complete()
        except (httptools.HttpParserInvalidURLError, UnicodeError, ValueError):
            self._refusal = (400, "the request line names no path")
            raise

    def on_message_complete(self) -> None:
        """The request is whole."""
        super().on_message_complete()
        self.scope["state"][BODY_IS_HERE] = True
        self._in_head, self._fed = True, 0

    def shutdown(self) -> None:
        """The server ends: what has been asked is answered, also where nobody here has read it yet."""
        self._end_when_idle(LOOKS)
        self._look_at_the_end_later()

    def _end_when_idle(self, looks: int) -> None:
        """End after so many looks whether something comes, each of which leaves the loop time to read."""
        if self.transport.is_closing() or (self._in_head and self._fed):
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif looks:
            self.loop.call_later(LOOK_S, self._end_when_idle, looks - 1)
        else:
            self.transport.close()

    def _look_at_the_end_later(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._end_timer = self.loop.call_later(self.http_limits.end_s, self._look_at_the_end)

    def _look_at_the_end(self) -> None:
        """Let go of a client that keeps the server from ending: it sends no whole request, or takes no reply."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent == self._unsent:
            self.transport.abort()
        elif not self.transport.is_closing() and (self._within_body() or (self._in_head and self._fed)):
            self._refuse(503, f"the server ends, and the request was not whole within {self.http_limits.end_s:g} s")
        self._look_at_the_end_later()

    def timeout_keep_alive_handler(self) -> None:
        """Idle for too long; a client that does not take the end of its reply keeps no memory either."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.http_limits.reply_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """The parser gave up."""
        self._refuse(*self._refusal)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._most_head_bytes:
            self._head_is_long()

    def _head_is_long(self) -> None:
        self._refusal = (431, f"the headers are longer than {self._most_head_bytes} bytes")
        raise HeadTooLong

    def _within_body(self) -> bool:
        """Whether what is wrong belongs to the request that is next to be answered, and not to one behind it."""
        cycle = self._running
        return cycle is not None and cycle is self.cycle and cycle.more_body and not cycle.response_started

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.http_limits.head_s, self._head_is_late)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._fed:
            self._refuse(408, f"the headers did not come within {self.http_limits.head_s:g} s")
        else:
            self.transport.close()

    def _refuse(self, code: int, message: str) -> None:
        """Write an error and close, whatever the application does."""
        self._forget_timer()
        body = orjson.dumps({"error": message})
        retry = b"retry-after: 1\r\n" if code == 503 else b""
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        if self.cycle is None or self.cycle.response_complete or self._within_body():
            self.transport.write(b"".join([STATUS_LINE[code], head, retry, b"\r\n", body]))
        self.transport.close()
        self.loop.call_later(LINGER_S, self.transport.abort)


def guarded_by(limits: HttpLimits) -> type[GuardedProtocol]:
    """The class of connections with these limits."""
    return type("LimitedProtocol", (GuardedProtocol,), {"http_limits": limits})
