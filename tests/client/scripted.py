"""A server of a test: on a real port, answering each request by the next of its replies."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

OK = b'{"model": "tiny", "base_digest": "b", "answers": [{"label": "banking", "score": 0.75, "labels": ["banking"], '
OK += b'"customer": "acme", "customer_digest": "d"}]}'


@dataclass(frozen=True)
class Asked:
    """A request as it arrived: its path, its headers with small names, its body, and when."""

    path: str
    headers: dict[str, str]
    body: bytes
    time_s: float


@dataclass(frozen=True)
class Reply:
    """What is answered.

    Attributes:
        status: its code; 0: the connection is closed instead.
        body: is sent in pieces of `piece` bytes, `pause_s` apart.
    """

    status: int = 200
    body: bytes = OK
    headers: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    piece: int = 2**20


@dataclass
class Scripted:
    """The server: its address, what it was asked, and its replies, the last of which is given for ever."""

    replies: list[Reply]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)

    def next(self) -> Reply:
        """The next reply."""
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def _handler(script: Scripted) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            script.asked.append(Asked(self.path, headers, body, time.monotonic()))
            reply = script.next()
            if not reply.status:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {"content-length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(0, len(reply.body), reply.piece):
                time.sleep(reply.pause_s)
                self.wfile.write(reply.body[start : start + reply.piece])
                self.wfile.flush()

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: stderr is the test's."""

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what some tests are about."""


@contextmanager
def scripted(*replies: Reply) -> Iterator[Scripted]:
    """A server that runs in the block."""
    script = Scripted(list(replies))
    server = _Server(("127.0.0.1", 0), _handler(script))
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()


Start = Callable[..., Scripted]
