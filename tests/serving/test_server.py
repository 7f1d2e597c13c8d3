"""A server that listens: what connections may take, and how it ends."""

import logging
import socket
import ssl
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

import uvicorn

from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.http.limits import HttpLimits
from qrlora_deploy.serving.served import Models, ServedModel
from qrlora_deploy.serving.server import Server, ServerOptions
from qrlora_deploy.serving.tls import Tls
from tests.runtime.place import until
from tests.serving.running import Running, read_reply, request, running
from tests.tiny import SENTENCES

ASK = {"texts": [SENTENCES[0]], "customer": "acme"}


@pytest.fixture
def front(models: Models) -> Front:
    return Front(models)


def ask(server: Running, data: bytes) -> tuple[int, dict[str, str], Any]:
    with server.connect() as connection:
        connection.sendall(data)
        return read_reply(connection)


def test_requests_one_after_another_and_ahead_of_their_answers(front: Front) -> None:
    with running(front) as server, server.connect() as connection:
        for number in range(3):
            connection.sendall(request("/v1/classify", ASK, x_request_id=str(number)))
            code, headers, record = read_reply(connection)
            assert (code, headers["x-request-id"]) == (200, str(number)) and len(record["answers"]) == 1
        connection.sendall(request("/v2") + request("/v2/health/ready"))
        file = connection.recv(10_000)
        while file.count(b"HTTP/1.1 200") < 2:
            file += connection.recv(10_000)


def test_an_idle_connection_and_slow_headers_end(front: Front) -> None:
    with running(front, limits=HttpLimits(head_s=0.2)) as server:
        with server.connect() as connection:
            assert read_reply(connection)[0] == 0
        with server.connect() as connection:
            connection.sendall(b"POST /v1/classify HTTP/1.1\r\nhost: te")
            code, headers, record = read_reply(connection)
            assert code == 408 and headers["connection"] == "close" and "0.2 s" in record["error"]
            assert connection.recv(1) == b""


def test_a_slow_body_ends(front: Front) -> None:
    with running(front, limits=HttpLimits(body_s=0.2)) as server, server.connect() as connection:
        connection.sendall(request("/v1/classify", ASK)[:-3])
        code, _, record = read_reply(connection)
        assert code == 408 and "body" in record["error"]
        assert connection.recv(1) == b""


@pytest.mark.parametrize("chunk", [b"zz\r\n{}\r\n", b"2\r\n{}xx\r\n", b"f" * 40])
def test_a_body_whose_chunks_are_none_is_told(front: Front, chunk: bytes) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n"
    with running(front) as server, server.connect() as connection:
        connection.sendall(head + chunk)
        code, headers, record = read_reply(connection)
        assert (code, headers["connection"], record["error"]) == (400, "close", "this is no HTTP request")
        assert connection.recv(1) == b""


def test_whose_body_is_not_whole_at_the_end_is_told(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    server = Running(front, ServerOptions(drain_s=0.2))
    with server.connect() as connection:
        connection.sendall(request("/v1/classify", ASK)[:-3])
        until(lambda: bool(server.server.http._uvicorn.server_state.tasks))
        server.stop()
        code, headers, record = read_reply(connection)
        assert code == 503 and "ends" in record["error"] and headers["retry-after"] == "1"
    assert "Traceback" not in caplog.text


HALVES = {
    "a body": request("/v1/classify", ASK)[:-3],
    "a head": request("/v1/classify", ASK)[:30],
    "a chunk": b"POST /v1/classify HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n4\r\n{",
    "a body after an answer": request("/v2") + request("/v1/classify", ASK)[:-3],
}


@pytest.mark.parametrize("name", HALVES)
def test_many_halves_of_requests_do_not_hold_up_the_end(front: Front, name: str) -> None:
    server = Running(front, ServerOptions(drain_s=40, limits=HttpLimits(end_s=0.5)))
    connections = [server.connect() for _ in range(200)]
    try:
        for connection in connections:
            connection.sendall(HALVES[name])
            if name == "a body after an answer":
                assert read_reply(connection)[0] == 200
        protocols = server.server.http._uvicorn.server_state.connections
        until(lambda: len(protocols) == 200 and all(it._fed or it._running is not None for it in protocols))
        # `stop` waits for less than what was begun may take.
        server.stop()
        for connection in connections:
            code, headers, record = read_reply(connection)
            assert code == 503 and headers["retry-after"] == "1" and headers["connection"] == "close"
            assert "not whole within 0.5 s" in record["error"] and connection.recv(1) == b""
    finally:
        for connection in connections:
            connection.close()
    assert server.failures == []


def test_a_body_that_gets_whole_in_time_is_answered_at_the_end(front: Front) -> None:
    server = Running(front, ServerOptions(drain_s=40, limits=HttpLimits(end_s=15)))
    whole = request("/v1/classify", ASK)
    with server.connect() as connection:
        connection.sendall(whole[:-3])
        until(lambda: bool(server.server.http._uvicorn.server_state.tasks))
        server.server.stop()
        until(lambda: front.life.draining)
        time.sleep(0.3)
        connection.sendall(whole[-3:])
        code, headers, record = read_reply(connection)
        assert (code, headers["connection"]) == (200, "close") and len(record["answers"]) == 1
    server.stop()
    assert server.failures == []


def test_who_takes_no_replies_does_not_hold_up_the_end(front: Front) -> None:
    server = Running(front, ServerOptions(drain_s=40, limits=HttpLimits(end_s=0.5)))
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request("/openapi.json") * 2000)
        protocols = server.server.http._uvicorn.server_state.connections
        until(lambda: any(it.transport.get_write_buffer_size() for it in protocols))
        server.stop()
    assert server.failures == []


@pytest.mark.parametrize(
    "head",
    [
        b"x: " + b"a" * 3000 + b"\r\n",
        b"x: y\r\n" * 200,
        b"x" * 3000 + b": y\r\n",
    ],
)
def test_headers_that_are_too_long(front: Front, head: bytes) -> None:
    with running(front, limits=HttpLimits(max_head_bytes=2000)) as server:
        code, headers, record = ask(server, b"GET /v2 HTTP/1.1\r\nhost: test\r\n" + head + b"\r\n")
        assert (code, headers["connection"]) == (431, "close") and "2000 bytes" in record["error"]
        # Also while it does not end.
        code, _, record = ask(server, b"GET /v2 HTTP/1.1\r\nhost: test\r\n" + head)
        assert code == 431
        assert ask(server, request("/" + "a" * 3000))[0] == 431
        assert ask(server, request("/v2"))[0] == 200


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n", b"\0" * 99]
)
def test_what_is_no_http(front: Front, data: bytes) -> None:
    with running(front) as server:
        code, _, record = ask(server, data)
        assert code == 400 and set(record) == {"error"}
        assert ask(server, request("/v2"))[0] == 200


def test_connections_are_bounded(front: Front) -> None:
    with running(front, limits=HttpLimits(max_connections=2)) as server:
        held = [server.connect() for _ in range(2)]
        for connection in held:
            connection.sendall(request("/v2"))
            assert read_reply(connection)[0] == 200
        with server.connect() as connection:
            code, headers, record = read_reply(connection)
            assert code == 503 and headers["retry-after"] == "1" and "connections" in record["error"]
        held.pop().close()
        deadline = time.monotonic() + 10
        while (code := ask(server, request("/v2"))[0]) != 200:
            assert code == 503 and time.monotonic() < deadline
        held.pop().close()


def test_who_takes_no_replies_is_let_go(front: Front) -> None:
    asked = 4000
    with running(front, limits=HttpLimits(reply_s=0.3)) as server, server.connect() as connection:
        connection.sendall(request("/openapi.json") * asked)
        time.sleep(2)
        found = 0
        try:
            while piece := connection.recv(2**20):
                found += piece.count(b"HTTP/1.1 200")
        except ConnectionError:
            pass
        assert found < asked
        assert ask(server, request("/v2"))[0] == 200


class Slow:
    """Makes each run of an engine wait until it is let go."""

    def __init__(self, model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.goes_on, self.entered = threading.Event(), threading.Event()
        run = model.engine._run  # type: ignore[attr-defined]

        def wait(rows: Any) -> Any:
            self.entered.set()
            assert self.goes_on.wait(20)
            return run(rows)

        monkeypatch.setattr(model.engine, "_run", wait)


def test_rows_of_a_client_that_has_gone_are_not_run(
    front: Front, model: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow(model, monkeypatch)
    with running(front) as server, server.connect() as first:
        first.sendall(request("/v1/classify", ASK))
        assert slow.entered.wait(10)
        second = server.connect()
        second.sendall(request("/v1/classify", ASK | {"texts": list(SENTENCES)}))
        until(lambda: model.engine._admitted == 7)  # type: ignore[attr-defined]
        second.close()
        until(lambda: model.engine._admitted == 1)  # type: ignore[attr-defined]
        slow.goes_on.set()
        assert read_reply(first)[0] == 200
    assert model.engine.stats().rows == 1
    assert caplog.text == ""


def test_who_goes_with_requests_ahead_of_their_answers_is_no_error(
    front: Front, model: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow(model, monkeypatch)
    with running(front) as server:
        with server.connect() as connection:
            connection.sendall(request("/v1/classify", ASK) * 3)
            assert slow.entered.wait(10)
            reset = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        until(lambda: not server.server.http._uvicorn.server_state.connections)
        slow.goes_on.set()
        assert ask(server, request("/v1/classify", ASK))[0] == 200
    assert caplog.text == ""


def test_what_was_begun_is_answered_before_the_end(
    front: Front, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(model, monkeypatch)
    server = Running(front, ServerOptions(drain_delay_s=0.0, drain_s=20.0))
    with server.connect() as connection, server.connect() as half, server.connect() as idle:
        connection.sendall(request("/v1/classify", ASK))
        half.sendall(request("/v1/classify", ASK)[:30])
        assert slow.entered.wait(10)
        server.server.stop()
        # Nobody new is taken, and who asks nothing is let go.
        assert idle.recv(1) == b""
        with pytest.raises(OSError):
            server.connect()
        assert server.thread.is_alive()
        half.sendall(request("/v1/classify", ASK)[30:])
        slow.goes_on.set()
        assert read_reply(connection)[0] == 200
        code, headers, _ = read_reply(half)
        assert code == 200 and headers["connection"] == "close"
    server.thread.join(20)
    assert not server.thread.is_alive() and server.failures == []
    assert model.engine.stats().draining


def test_requests_that_were_sent_before_the_end_are_answered(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, shutdown = threading.Event(), uvicorn.Server.shutdown

    async def busy_and_end(self: uvicorn.Server, sockets: Any = None) -> None:
        # What comes meanwhile has arrived, and nobody has read it when connections are told to end.
        ends.set()
        time.sleep(0.5)
        await shutdown(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "shutdown", busy_and_end)
    server = Running(front, ServerOptions())
    with server.connect() as idle, server.connect() as fresh:
        idle.sendall(request("/v1/classify", ASK))
        assert read_reply(idle)[0] == 200
        ending = threading.Thread(target=server.stop)
        ending.start()
        assert ends.wait(10)
        for connection in (idle, fresh):
            connection.sendall(request("/v1/classify", ASK))
        for connection in (idle, fresh):
            code, headers, _ = read_reply(connection)
            assert (code, headers["connection"]) == (200, "close")
        ending.join(20)
    assert server.failures == []


def test_during_the_delay_everything_is_answered_but_readiness_is_off(front: Front) -> None:
    server = Running(front, ServerOptions(drain_delay_s=60.0))
    assert ask(server, request("/v2/health/ready"))[0] == 200
    server.server.stop()
    deadline = time.monotonic() + 10
    while ask(server, request("/v2/health/ready"))[0] == 200:
        assert time.monotonic() < deadline
    code, headers, _ = ask(server, request("/v1/classify", ASK))
    assert code == 200 and headers["connection"] == "close"
    # The second signal does not wait.
    server.stop()
    assert server.failures == []


def test_an_end_that_takes_too_long_is_told(front: Front, model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.engine, "drain", lambda timeout_s: False)
    server = Running(front, ServerOptions())
    server.stop()
    assert len(server.failures) == 1 and isinstance(server.failures[0], QrloraError)
    assert "raise drain_s" in str(server.failures[0])


def test_an_address_that_is_taken_or_none(front: Front) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port} cannot be listened on"):
            Server(front, ServerOptions(port=port))
    with pytest.raises(InputError, match="choose another host"):
        Server(front, ServerOptions(host="no.such.host.invalid"))


def test_tls_files_that_are_none(front: Front, tmp_path: Path) -> None:
    (tmp_path / "cert").write_text("nothing", "utf-8")
    for cert in ("cert", "none"):
        with pytest.raises(InputError, match="TLS cannot be offered") as caught:
            Server(front, ServerOptions(port=0, tls=Tls(tmp_path / cert, tmp_path / cert)))
        assert "\n" not in str(caught.value)


def test_an_authority_of_no_certificate_is_named(front: Front, certificates: Path, tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("nothing", "utf-8")
    tls = Tls(certificates / "server.pem", certificates / "server.key", tmp_path / "ca")
    with pytest.raises(InputError, match=r"/ca holds no certificates of those who sign the clients'"):
        Server(front, ServerOptions(port=0, tls=tls))


def is_answered(server: Running, context: ssl.SSLContext) -> bool:
    try:
        with server.connect() as plain, context.wrap_socket(plain, server_hostname="localhost") as connection:
            connection.sendall(request("/v1/classify", ASK))
            return read_reply(connection)[0] == 200
    except OSError:
        return False


def test_tls_and_certificates_of_clients(front: Front, certificates: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    tls = Tls(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    with running(front, tls=tls) as server:
        assert server.server.http.url.startswith("https://")
        context = ssl.create_default_context(cafile=certificates / "ca.pem")
        assert not is_answered(server, context)
        context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
        assert is_answered(server, context)
