"""A server in a thread of its own, and plain connections to it."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.server import Server, ServerOptions

DEADLINE_S = 20.0


class Running:
    """A server that runs.

    Attributes:
        failures: what `run` ended with.
    """

    def __init__(self, front: Front, options: ServerOptions) -> None:
        self.server, self.failures = Server(front, replace(options, port=0)), []  # type: ignore[var-annotated]
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self.started.wait(DEADLINE_S)

    def _run(self) -> None:
        try:
            self.server.run(self.started.set)
        except BaseException as error:
            self.failures.append(error)

    def stop(self) -> None:
        """End it, and wait for that."""
        if self.thread.is_alive():
            self.server.stop()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.http.port), DEADLINE_S)


@contextmanager
def running(front: Front, **options: Any) -> Iterator[Running]:
    run = Running(front, ServerOptions(**options))
    try:
        yield run
    finally:
        run.stop()


def read_reply(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Code, headers and JSON of a reply; code 0 where the connection ended without one."""
    file = connection.makefile("rb")
    line = file.readline()
    if not line:
        return 0, {}, None
    headers = {}
    while (pair := file.readline().strip()) != b"":
        name, _, value = pair.decode().partition(":")
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers, json.loads(file.read(int(headers["content-length"])))


def request(path: str, record: Any = None, **headers: str) -> bytes:
    """A request's bytes."""
    body = b"" if record is None else json.dumps(record).encode()
    lines = [f"{'GET' if record is None else 'POST'} {path} HTTP/1.1", "host: test", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
