"""`qrlora-deploy serve --grpc-port` as a user runs it."""

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.prediction.predictor import Predictor
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.cli.running import run, run_here
from tests.serving.grpc.client import Client, outputs_of, request, texts
from tests.serving.process import Served
from tests.tiny import SENTENCES
from tests.tolerances import FP32_ONNX

TEXTS = list(SENTENCES)
PORT = ("--grpc-port", 0)


@pytest.fixture
def place(tmp_path: Path, switchable: Path, customers: dict[str, Coefficients]) -> Path:
    """A folder with a bundle, `tiny`, and customers."""
    (tmp_path / "tiny").symlink_to(switchable)
    (tmp_path / "customers").mkdir()
    for name in ("acme", "beta"):
        write_coefficients(customers[name], tmp_path / "customers" / f"{name}.safetensors")
    return tmp_path


def asking(server: Served, ask: Callable[[Client], Any]) -> Any:
    async def run() -> Any:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports['--grpc-port']}") as channel:
            return await ask(Client(channel))

    return asyncio.run(run())


def arguments(*more: object) -> tuple[object, ...]:
    return ("--model", "tiny=tiny", "--customers", "customers", "--threads", 1, *PORT, *more)


def test_customers_are_answered_over_grpc(place: Path, customers: dict[str, Coefficients]) -> None:
    session = SwitchableSession(open_bundle(place / "tiny"), threads=1)
    for name in ("acme", "beta"):
        session.load(name, customers[name])
    owners = ["acme", "", "beta", "acme", "beta", ""]
    expected = Predictor(session).predict(TEXTS, customers=[name or None for name in owners])
    with Served(*arguments(), cwd=place) as server:
        reply = asking(server, lambda client: client.infer(request([texts(TEXTS), texts(owners, "customer")])))
        found = outputs_of(reply)
        np.testing.assert_allclose(found["logits"], [one.logits for one in expected], **FP32_ONNX)
        assert list(found["label"]) == [one.label for one in expected]
        taken = run("serve", "tiny", "--port", 0, "--grpc-port", server.ports["--grpc-port"], cwd=place)
        assert taken.code == 2 and "cannot be listened on" in taken.err and len(taken.err.splitlines()) == 1
    assert server.end() == 0 and server.errors == []


def test_a_key_of_the_file(place: Path) -> None:
    key = run_here("keys", "add", "keys.json", "--customer", "acme", "--json", cwd=place).json["key"]
    metadata = (("authorization", f"Bearer {key}"),)

    async def ask(client: Client) -> list[grpc.StatusCode]:
        await client.infer(request([texts(TEXTS)], customer="acme"), metadata=metadata)
        other = await client.error(request([texts(TEXTS)], customer="beta"), metadata=metadata)
        return [other.code(), (await client.error(request([texts(TEXTS)], customer="acme"))).code()]

    with Served(*arguments("--keys", "keys.json"), cwd=place) as server:
        assert asking(server, ask) == [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED]


def test_sigterm_under_load_loses_no_request(place: Path) -> None:
    async def ask(client: Client) -> list[int]:
        gone, counts = asyncio.Event(), [0] * 6

        async def load(number: int) -> None:
            while not gone.is_set():
                sent = request([texts(TEXTS[: number + 1])], ["label"], ("acme", "beta")[number % 2])
                assert len((await client.infer(sent)).outputs) == 1
                counts[number] += 1

        async def watch() -> None:
            call = health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest(service="tiny"))
            while (await call.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                pass
            gone.set()

        async def end() -> None:
            deadline = time.monotonic() + 30
            while min(counts) < 5:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            server.send(signal.SIGTERM)

        await asyncio.gather(watch(), end(), *(load(number) for number in range(6)))
        return counts

    with Served(*arguments("--drain-delay", 3), cwd=place) as server:
        assert min(asking(server, ask)) >= 5
        assert server.wait() == 0
    assert server.errors == []


def test_the_second_signal_does_not_wait(place: Path) -> None:
    async def ask(client: Client) -> None:
        watch = health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        server.send(signal.SIGTERM)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        server.send(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait) == 0

    with Served(*arguments("--drain-delay", 600), cwd=place) as server:
        asking(server, ask)


def test_noise_leaves_no_line_of_grpcs_own(place: Path) -> None:
    async def ask(client: Client) -> None:
        for noise in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256))):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.ports["--grpc-port"])
            writer.write(noise)
            await asyncio.wait_for(reader.read(), 10)
            writer.close()
        await client.infer(request([texts(TEXTS)]))

    with Served(*arguments(), cwd=place) as server:
        asking(server, ask)
    assert server.end() == 0 and server.errors == []
