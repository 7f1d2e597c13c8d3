"""A storm of valid and hostile requests, over HTTP and gRPC, while processes are killed and customers are swapped.

    QRLORA_STORM=10000 pytest -m slow tests/serving/storm

Every answer is held against the session's own; nothing hostile is answered by a failure of the server.
"""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc", reason="needs the extra serve")

import grpc

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.tokenizing import RowTokenizer
from tests.serving.engine.place import alone
from tests.serving.grpc.client import Client as GrpcClient
from tests.serving.grpc.client import outputs_of
from tests.serving.process import Served
from tests.serving.storm.asking import (
    INFER,
    SENTENCES,
    Expected,
    Rows,
    Tally,
    hostile_http,
    hostile_message,
    logits_of_binary,
    logits_of_json,
)
from tests.serving.test_processes import children, httpx, is_ready, metric, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REQUESTS = int(os.environ.get("QRLORA_STORM", "3000"))
THREADS, CALLERS = 6, 4
GOOD_HTTP = {"200", "400", "401", "404", "405", "408", "413", "415", "422", "429", "431", "503", "504"}
GOOD_GRPC = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "FAILED_PRECONDITION"}
DAMAGED = "cannot be used"
"""What is said of a customer whose file is damaged and who is not in memory, since the engine was started again."""


@pytest.fixture
def versions(customers: dict[str, Coefficients]) -> dict[str, list[Coefficients]]:
    """Two of each customer."""
    return {name: [it, replace(it, values=it.values * np.float32(0.3))] for name, it in customers.items()}


@pytest.fixture
def place(tmp_path: Path, switchable: Path, versions: dict[str, list[Coefficients]]) -> Path:
    shutil.copytree(switchable, tmp_path / "bundle")
    (tmp_path / "customers").mkdir()
    for name, (first, _) in versions.items():
        write_coefficients(first, tmp_path / "customers" / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def expected(switchable: Path, versions: dict[str, list[Coefficients]]) -> Expected:
    """What one session says of each version, a text at a time."""
    session = SwitchableSession(open_bundle(switchable), threads=1)
    tokenizer = RowTokenizer(session.bundle)
    found: dict[tuple[str | None, str], dict[str, np.ndarray]] = {}

    def add(name: str | None, digest: str) -> None:
        rows = tokenizer.rows(list(SENTENCES), None, [name] * len(SENTENCES))
        found[name, digest] = {text: alone(session, row) for text, row in zip(SENTENCES, rows, strict=True)}

    add(None, "")
    for name, both in versions.items():
        for version in both:
            session.load(name, version)
            add(name, version.digest)
    return found


class Storm:
    """Clients of a server until as many requests were made."""

    def __init__(self, server: Served, expected: Expected, total: int) -> None:
        self.server, self.expected, self.total = server, expected, total
        self.names = (None, *{name for name, _ in expected if name is not None})
        self.tally, self.lock, self.made, self.lost = Tally(), threading.Lock(), 0, 0
        self.threads = [threading.Thread(target=self._over_http, args=(seed,)) for seed in range(THREADS)]
        self.threads.append(threading.Thread(target=lambda: asyncio.run(self._over_grpc())))
        self.threads.append(threading.Thread(target=self._slowly))
        for thread in self.threads:
            thread.start()

    @property
    def over(self) -> bool:
        return self.made >= self.total

    def join(self) -> None:
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()

    def _over_http(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.over:
            try:
                with httpx.Client(base_url=self.server.url, timeout=60) as client:
                    for _ in range(20):
                        self._one(client, chance)
            except httpx.TimeoutException as error:
                with self.lock:
                    self.tally.wrong.append(f"no answer: {error!r}")
            except httpx.TransportError:
                # A front was killed, or a request was no HTTP.
                self.lost += 1
                time.sleep(0.01)

    def _one(self, client: Any, chance: random.Random) -> None:
        self.made += 1
        if chance.random() < 0.4:
            method, path, body, headers = hostile_http(chance)
            reply = client.request(method, path, content=body, headers=headers)
            self._judge(reply, f"{method} {path} {headers} {body[:300]!r}")
            return
        rows, binary = Rows.random(chance, self.names), chance.random() < 0.5
        reply = client.post(INFER, content=rows.as_json(binary))
        self._judge(reply, "a valid request")
        if reply.status_code == 200:
            head = int(reply.headers.get("inference-header-content-length", 0))
            found = logits_of_binary(reply.content, head) if binary else logits_of_json(reply.content)
            with self.lock:
                rows.compare(*found, self.expected, self.tally)
        elif reply.status_code not in (429, 503) and not (reply.status_code == 422 and DAMAGED in reply.text):
            with self.lock:
                self.tally.wrong.append(f"{reply.status_code} to a valid request: {reply.text}")

    def _judge(self, reply: Any, what: str) -> None:
        with self.lock:
            self.tally.count("http", reply.status_code)
            if str(reply.status_code) not in GOOD_HTTP:
                self.tally.wrong.append(f"{reply.status_code} {reply.text[:200]} to {what}")
            if reply.status_code in (429, 503) and int(reply.headers.get("retry-after", 0)) < 1:
                self.tally.wrong.append(f"{reply.status_code} without Retry-After to {what}")
            if reply.status_code >= 400 and set(json.loads(reply.content)) != {"error"}:
                self.tally.wrong.append(f"{reply.status_code} without a line to {what}: {reply.text[:200]}")

    async def _over_grpc(self) -> None:
        async with asyncio.TaskGroup() as group:
            for seed in range(CALLERS):
                group.create_task(self._calls(random.Random(1000 + seed)))

    async def _calls(self, chance: random.Random) -> None:
        target = f"127.0.0.1:{self.server.ports['--grpc-port']}"
        while not self.over:
            # A channel of its own, so that both fronts are met.
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(target, options=options) as channel:
                client = GrpcClient(channel)
                for _ in range(20):
                    await self._call(client, chance)

    async def _call(self, client: GrpcClient, chance: random.Random) -> None:
        self.made += 1
        hostile = chance.random() < 0.4
        rows = Rows.random(chance, self.names)
        sent = hostile_message(chance) if hostile else rows.as_message(raw=chance.random() < 0.5)
        try:
            reply = await client.infer(sent, timeout=60)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            allowed = GOOD_GRPC if hostile else {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}
            with self.lock:
                self.tally.count("grpc", code)
                if code not in allowed and DAMAGED not in str(error.details()):
                    self.tally.wrong.append(f"{code} {error.details()} to {str(sent)[:300]}")
            return
        with self.lock:
            self.tally.count("grpc", "OK")
            if not hostile:
                outputs = outputs_of(reply)
                rows.compare(outputs["logits"], list(outputs["digest"]), self.expected, self.tally)

    def _slowly(self) -> None:
        """Clients that send halves and never go on, or take no replies."""
        halves = (b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{", b"GET / HT", b"\x16\x03\x01")
        held: list[socket.socket] = []
        while not self.over:
            try:
                held.append(socket.create_connection(("127.0.0.1", self.server.port), 20))
                held[-1].sendall(halves[len(held) % 3])
            except OSError:
                pass
            if len(held) > 100:
                held.pop(0).close()
            time.sleep(0.05)
        for connection in held:
            connection.close()


def chaos(server: Served, place: Path, versions: dict[str, list[Coefficients]], storm: Storm) -> Iterator[str]:
    """One disturbance after the other; what it was."""
    chance = random.Random(7)
    for number in range(10**6):
        name = chance.choice(sorted(versions))
        file = place / "customers" / f"{name}.safetensors"
        if number % 6 == 5:
            os.kill(chance.choice(children(server, "front")), chance.choice((signal.SIGKILL, signal.SIGSTOP)))
            until(lambda: len(children(server, "front")) == 2)
            yield "a front"
        elif number % 6 == 3:
            server.send(signal.SIGHUP)
            yield "reload"
        elif number % 6 == 1:
            # The version before goes on.
            file.write_bytes(file.read_bytes()[:-7])
            yield "a damaged file"
        elif number == 8:
            # Once: the second time within ten minutes ends the server.
            os.kill(children(server, "engine")[0], signal.SIGKILL)
            yield "an engine"
        else:
            write_coefficients(chance.choice(versions[name]), file)
            yield "a swap"


@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_is_wrong_in_a_storm(
    place: Path, versions: dict[str, list[Coefficients]], expected: Expected, devices: int
) -> None:
    options = (
        *("--device", "cpu") * devices,
        "--customers",
        "customers",
        "--threads",
        1,
        "--processes",
        2,
        "--hang-seconds",
        5,
        "--grpc-port",
        0,
    )
    with Served("bundle", *options, cwd=place) as server:
        storm = Storm(server, expected, REQUESTS)
        done: list[str] = []
        for what in chaos(server, place, versions, storm):
            done.append(what)
            time.sleep(0.3)
            if storm.over:
                break
        storm.join()
        for name, (first, _) in versions.items():
            write_coefficients(first, place / "customers" / f"{name}.safetensors")
        until(lambda: is_ready(server.url) and len(children(server, "front")) == 2)
        until(lambda: metric(server.url, "qrlora_queue_rows") == 0)
        last = Tally()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            rows = Rows(SENTENCES, [*versions, None])
            until(lambda: client.post(INFER, content=rows.as_json(False)).status_code == 200)
            rows.compare(*logits_of_json(client.post(INFER, content=rows.as_json(False)).content), expected, last)
        assert server.end() == 0, server.errors[-5:]
    tally = storm.tally
    print(tally.codes, tally.rows, storm.lost, {what: done.count(what) for what in done})
    assert not tally.wrong and not last.wrong, (len(tally.wrong), tally.wrong[:10], last.wrong)
    assert tally.rows > storm.total / 2 and len(tally.seen) > len(versions) + 1, tally
    assert tally.codes["http", "200"] > storm.total / 10 and tally.codes["grpc", "OK"] > storm.total / 50
    assert not any("Traceback" in line for line in server.errors), server.errors
