"""Ray Serve has more replicas while rows wait, and fewer when none do."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra ray; .ci/ray_only runs it")

from ray import serve

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.opening import ModelPlaces, RunOptions
from qrlora_deploy.serving.ray.calls import Call
from qrlora_deploy.serving.ray.deployment import NAME
from qrlora_deploy.serving.ray.options import RayOptions, RayServerOptions
from qrlora_deploy.serving.ray.rendezvous import ranked
from qrlora_deploy.serving.ray.replica import ReplicaOptions
from qrlora_deploy.serving.ray.running import RayServer
from qrlora_deploy.serving.ray.scaling import Scaling
from qrlora_deploy.serving.server import ServerOptions
from tests.tiny import SENTENCES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

QUICKLY = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
}
"""Ray Serve tells its controller of waiting rows every ten seconds unless told otherwise."""


@pytest.fixture(scope="module")
def server(
    switchable: Path, tiny_customer: Coefficients, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RayServer]:
    folder = tmp_path_factory.mktemp("customers")
    for name in ("acme", "bolt", "cosy"):
        write_coefficients(tiny_customer, folder / f"{name}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICKLY.items():
            patch.setenv(name, value)
        run = RunOptions(threads=1, limits=Limits(max_batch_tokens=32))
        replica = ReplicaOptions([ModelPlaces("tiny", switchable, folder)], run)
        app = RayOptions(replica, Scaling((1, 3), queued_rows=8, up_s=1.0, down_s=1.0), cpus=0.5)
        server = RayServer(RayServerOptions(app, ServerOptions(port=0)))
        yield server
        server.close()


def replicas() -> int:
    return serve.status().applications["qrlora"].deployments[NAME].replica_states.get("RUNNING", 0)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, serve.status()
        time.sleep(0.2)


def call(customer: str | None, rows: int = 1, avoid: tuple[str, ...] = ()) -> Call:
    body = json.dumps({"texts": list(SENTENCES[:1]) * rows, "customer": customer}).encode()
    return Call("POST", "/v1/classify", body=body, customer=customer, avoid=avoid)


class Pressure:
    """Rows that wait: eight requests of 64 at a time."""

    def __init__(self, server: RayServer) -> None:
        self.server, self.done, self.codes = server, threading.Event(), list[int]()

    def __enter__(self) -> "Pressure":
        self.thread = threading.Thread(target=lambda: asyncio.run(self._all()))
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.thread.join(60)

    async def _all(self) -> None:
        await asyncio.gather(*(self._one("abc"[number % 3]) for number in range(8)))

    async def _one(self, name: str) -> None:
        while not self.done.is_set():
            self.codes.append((await self.server._replicas.ask(call(None, 64))).status)


def test_more_and_fewer_replicas_and_each_customer_at_its_own(server: RayServer) -> None:
    assert replicas() == 1
    with Pressure(server) as pressure:
        until(lambda: replicas() == 3)
    assert set(pressure.codes) == {200}

    async def places(customer: str, avoid: tuple[str, ...] = ()) -> str:
        reply = await server._replicas.ask(call(customer, avoid=avoid))
        assert reply.status == 200
        return reply.replica

    async def all_places() -> None:
        names = sorted({(await server._replicas.ask(call(None))).replica for _ in range(30)})
        for customer in ("acme", "bolt", "cosy"):
            order = [await places(customer)]
            order.append(await places(customer, tuple(order)))
            # Scaling down may take the third one away at any time.
            found = [place for place in ranked(customer, {*names, *order}) if place in order]
            assert order == found and order[0] != order[1]

    asyncio.run(all_places())
    until(lambda: replicas() == 1)
    assert os.environ.get("RAY_USAGE_STATS_ENABLED") == "0"
