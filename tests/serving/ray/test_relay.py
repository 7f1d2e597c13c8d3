"""A front over replicas in this process, which are real ones: the answers are those of one server, whatever ends."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

pytest.importorskip("httpx", reason="needs the extra client")
from starlette.testclient import TestClient

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.serving.access import Keys
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.engine.rows import Load
from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.keys_file import Quota, empty_keys, with_key, write_keys
from qrlora_deploy.serving.opened import OpenedFront
from qrlora_deploy.serving.opening import ModelPlaces, RunOptions
from qrlora_deploy.serving.ray.calls import Call, Reply
from qrlora_deploy.serving.ray.relay import RelayFront
from qrlora_deploy.serving.ray.rendezvous import ranked
from qrlora_deploy.serving.ray.replica import Replica, ReplicaOptions
from qrlora_deploy.serving.ray.totals import Totals as RelayTotals
from qrlora_deploy.serving.refusals import LostError
from tests.runtime.place import until
from tests.tiny import SENTENCES

TEXTS = list(SENTENCES)
ONE = RunOptions(threads=1)


class Nearby:
    """`Replicas` in this process.

    Attributes:
        lost: how many calls are still lost with the replica that has them, and after it has answered them.
        asked: names of the replicas that had a call.
    """

    def __init__(self, options: ReplicaOptions, names: str = "abc") -> None:
        self.replicas = {name: Replica(options, name) for name in names}
        self.lost, self.asked = 0, list[str]()

    async def ask(self, call: Call) -> Reply:
        names = [name for name in self.replicas if name not in call.avoid]
        name = ranked(call.customer or "", names)[0]
        self.asked.append(name)
        reply = await self.replicas[name].answer(call)
        if self.lost:
            self.lost -= 1
            raise LostError("it ended")
        return reply

    async def stats(self) -> list[Mapping[str, EngineStats]]:
        return [replica.stats() for replica in self.replicas.values()]


@pytest.fixture
def places(switchable: Path, customers: dict[str, Coefficients], tmp_path: Path) -> list[ModelPlaces]:
    folder = tmp_path / "customers"
    folder.mkdir()
    for name, customer in customers.items():
        write_coefficients(customer, folder / f"{name}.safetensors")
    return [ModelPlaces("tiny", switchable, folder)]


@pytest.fixture
def nearby(places: list[ModelPlaces]) -> Iterator[Nearby]:
    nearby = Nearby(ReplicaOptions(places, ONE))
    yield nearby
    for replica in nearby.replicas.values():
        replica.close()


@pytest.fixture
def client(nearby: Nearby) -> Iterator[TestClient]:
    front = RelayFront(nearby, counted=["acme"])
    front.life.begin()
    with TestClient(make_app(front)) as client:
        yield client


@pytest.fixture
def alone(places: list[ModelPlaces]) -> Iterator[TestClient]:
    """One server with the same models."""
    opened = OpenedFront(places, ONE)
    opened.front.life.begin()
    with TestClient(make_app(opened.front)) as client:
        yield client
    opened.close()


def classify(customer: str | None, **more: Any) -> dict[str, Any]:
    return {"texts": TEXTS, "customer": customer} | more


TENSOR = {"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}

REQUESTS: list[tuple[str, str, Any, dict[str, str]]] = [
    *(("POST", "/v1/classify", classify(name), {}) for name in ("acme", "beta", "gamma", "delta", None, "nobody")),
    ("POST", "/v1/classify", {"texts": "one"}, {}),
    ("POST", "/v1/classify", b"{", {}),
    ("POST", "/v1/embeddings", {"input": "a"}, {}),
    ("POST", "/v1/classify", classify("acme"), {"x-request-timeout-ms": "0"}),
    ("POST", "/v1/classify", classify("acme"), {"x-request-timeout-ms": "soon"}),
    ("POST", "/v2/models/tiny/infer", {"inputs": [TENSOR]}, {}),
    ("POST", "/v2/models/none/infer", {}, {}),
    ("POST", "/v2/models/tiny/infer", b"{}binary", {"inference-header-content-length": "2"}),
    ("GET", "/v2", None, {}),
    ("GET", "/v2/models/tiny", None, {}),
    ("GET", "/v2/models/tiny/versions/1/ready", None, {}),
    ("GET", "/v2/models/tiny/versions/2/config", None, {}),
    ("GET", "/v2/models/t%C3%BCny/config", None, {}),
    ("GET", "/v2/health/live", None, {}),
    ("GET", "/v2/health/ready", None, {}),
    ("GET", "/openapi.json", None, {}),
    ("GET", "/v1/classify", None, {}),
    ("GET", "/elsewhere", None, {}),
    ("POST", "/v2/repository/index", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: f"{request[0]} {request[1]} {request[2]!r:.30}")
def test_replies_are_those_of_one_server(
    client: TestClient, alone: TestClient, request_: tuple[str, str, Any, dict[str, str]]
) -> None:
    method, path, record, headers = request_
    body = record if isinstance(record, bytes) else b"" if record is None else orjson.dumps(record)
    headers = headers | {"x-request-id": "same"}
    for more in ({}, {"accept-encoding": "gzip"}, {"accept-encoding": "identity"}):
        ours, theirs = (it.request(method, path, content=body, headers=headers | more) for it in (client, alone))
        assert (ours.status_code, ours.content, dict(ours.headers)) == (
            theirs.status_code,
            theirs.content,
            dict(theirs.headers),
        )


def test_a_customer_stays_where_it_is_and_customers_are_spread(client: TestClient, nearby: Nearby) -> None:
    for _ in range(3):
        assert client.post("/v1/classify", json=classify("beta")).status_code == 200
    assert len(set(nearby.asked)) == 1
    for number in range(30):
        client.post("/v1/classify", json=classify(f"customer-{number}"))
    assert set(nearby.asked) == {"a", "b", "c"}


def test_a_request_is_asked_once_more_and_not_twice(client: TestClient, alone: TestClient, nearby: Nearby) -> None:
    nearby.lost = 1
    reply = client.post("/v1/classify", json=classify("acme"))
    assert reply.status_code == 200 and len(nearby.asked) == 2
    assert reply.content == alone.post("/v1/classify", json=classify("acme")).content
    nearby.lost = 2
    reply = client.post("/v1/classify", json=classify("acme"))
    assert reply.status_code == 503 and "retry-after" in reply.headers and len(nearby.asked) == 4
    assert 'qrlora_asked_again_total{reason="lost"} 2.0' in client.get("/metrics").text


def test_a_replica_that_is_full_gives_its_request_to_the_next(places: list[ModelPlaces]) -> None:
    full, free = ranked("acme", "ab")
    limited = replace(ONE, limits=Limits(max_queue_rows=6, customer_share=1.0))
    nearby = Nearby(ReplicaOptions(places, limited), "ab")
    front = RelayFront(nearby)
    front.life.begin()
    engines = [next(iter(nearby.replicas[name]._opened.front.models)).engine for name in (full, free)]
    with TestClient(make_app(front)) as client:
        held = engines[0].admit(Load(1, 1, 1), ["beta"])
        assert client.post("/v1/classify", json=classify("acme")).status_code == 200
        assert nearby.asked == [full, free]
        engines[1].admit(Load(1, 1, 1), ["beta"])
        reply = client.post("/v1/classify", json=classify("acme"))
        assert reply.status_code == 429 and "retry-after" in reply.headers
        engines[0].release(held)
        assert client.post("/v1/classify", json=classify("acme")).status_code == 200
        assert nearby.asked[4:] == [full]
        assert 'qrlora_asked_again_total{reason="overloaded"} 2.0' in client.get("/metrics").text
    for replica in nearby.replicas.values():
        replica.close()


def test_keys_and_quotas_hold_and_a_quota_is_not_spilled(places: list[ModelPlaces], tmp_path: Path) -> None:
    keys, key = keys_file(tmp_path)
    nearby = Nearby(ReplicaOptions(places, ONE, keys))
    front = RelayFront(nearby, Keys.open(keys))
    front.life.begin()
    mine = {"authorization": f"Bearer {key}"}
    with TestClient(make_app(front)) as client:
        assert client.post("/v1/classify", json=classify("acme")).status_code == 401
        assert client.get("/metrics").status_code == 401 and nearby.asked == []
        assert client.post("/v1/classify", json=classify("beta"), headers=mine).status_code == 404
        codes = [client.post("/v1/classify", json=classify("acme"), headers=mine).status_code for _ in range(2)]
        assert codes == [200, 429] and len(nearby.asked) == 3
    for replica in nearby.replicas.values():
        replica.close()


def keys_file(folder: Path) -> tuple[Path, str]:
    """A file with a key for acme, which may ask six rows and then one in 1,000 seconds."""
    keys, _, key = with_key(empty_keys(), ["acme"], [])
    quotas = {"acme": Quota(rows_per_second=0.001, burst=len(TEXTS))}
    write_keys(keys.model_copy(update={"quotas": quotas}), folder / "keys.json")
    return folder / "keys.json", key


def test_metrics_are_of_all_replicas(client: TestClient) -> None:
    for name in ("acme", "beta", "gamma", "delta"):
        client.post("/v1/classify", json=classify(name))
    text = client.get("/metrics").text
    assert 'qrlora_rows_total{model="tiny"} 24.0' in text
    assert 'qrlora_requests_total{code="200",route="/v1/classify"} 4.0' in text
    assert 'qrlora_request_rows_total{route="/v1/classify"} 24.0' in text
    assert 'qrlora_customer_rows_total{customer="acme"} 6.0' in text


def test_a_new_version_of_a_customer_is_answered_everywhere(
    client: TestClient, nearby: Nearby, places: list[ModelPlaces], customers: dict[str, Coefficients]
) -> None:
    assert client.post("/v1/classify", json=classify("acme")).status_code == 200
    assert places[0].customers is not None
    write_coefficients(customers["beta"], places[0].customers / "acme.safetensors")
    assert [replica.reload() for replica in nearby.replicas.values()] == [None] * 3
    call = Call("POST", "/v1/classify", body=orjson.dumps(classify("acme")), customer="acme")
    for replica in nearby.replicas.values():
        reply = asyncio.run(replica.answer(call))
        assert orjson.loads(reply.body)["answers"][0]["customer_digest"] == customers["beta"].digest


def test_not_ready_once_it_drains(nearby: Nearby) -> None:
    front = RelayFront(nearby)
    with TestClient(make_app(front)) as client:
        assert client.get("/v2/health/ready").status_code == 503
        assert client.post("/v1/classify", json=classify("acme")).status_code == 503
        front.life.begin()
        assert client.get("/v2/health/ready").status_code == 200
        front.life.drain()
        assert client.get("/v2/health/ready").status_code == 503
        assert client.post("/v1/classify", json=classify("acme")).status_code == 200
    assert nearby.asked.count("a") + nearby.asked.count("b") + nearby.asked.count("c") == 2


def test_the_page_is_of_the_front_and_of_all_replicas(client: TestClient, nearby: Nearby) -> None:
    page = client.get("/")
    assert page.status_code == 200 and "live.js" in page.text and client.get("/live.js").status_code == 200
    client.get("/live.json")
    for name in ("acme", "beta", "gamma", "delta"):
        assert client.post("/v1/classify", json={"texts": TEXTS, "customer": name}).status_code == 200
    assert client.post("/v1/classify", json={"texts": TEXTS, "customer": "nobody"}).status_code == 404

    def numbers() -> dict[str, Any]:
        found: dict[str, Any] = client.get("/live.json").json()
        return found

    until(lambda: numbers()["refused"] == {"unknown_customer": 1})
    found = numbers()
    rows = 4 * len(TEXTS)
    assert [model["name"] for model in found["models"]] == ["tiny"] and found["models"][0]["ready"]
    assert found["models"][0]["rows_s"] * found["seconds"] == pytest.approx(rows, rel=0.02)
    # Counted by buckets in each replica, and added up bucket by bucket.
    each = [replica.stats()["tiny"] for replica in nearby.replicas.values()]
    total = RelayTotals()
    total.take([replica.stats() for replica in nearby.replicas.values()])
    assert sum(total.stats()["tiny"].queue_counts) == rows == sum(sum(stats.queue_counts) for stats in each)
    assert len(total.stats()["tiny"].queue_counts) == max(len(stats.queue_counts) for stats in each)


def test_replicas_that_cannot_be_asked_leave_the_page_as_it_was(client: TestClient, nearby: Nearby) -> None:
    assert client.post("/v1/classify", json={"texts": TEXTS, "customer": "acme"}).status_code == 200
    assert [model["name"] for model in client.get("/live.json").json()["models"]] == ["tiny"]

    async def broken() -> list[Mapping[str, EngineStats]]:
        raise LostError("gone")

    nearby.stats = broken  # type: ignore[method-assign]
    reply = client.get("/live.json")
    assert reply.status_code == 200 and [model["name"] for model in reply.json()["models"]] == ["tiny"]
