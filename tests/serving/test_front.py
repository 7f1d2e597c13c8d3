"""What a server says of itself: the shapes of the protocol and of Triton, keys, errors, OpenAPI."""

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from qrlora_deploy.serving.access import Access
from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.http.openapi import openapi
from qrlora_deploy.serving.refusals import UnauthenticatedError
from qrlora_deploy.serving.served import Models, ServedModel
from tests.tiny import SENTENCES

pytest.importorskip("httpx", reason="needs the extra client")
from starlette.testclient import TestClient

ASK = {"texts": [SENTENCES[0]], "customer": "acme"}


class Keys:
    """One key."""

    @staticmethod
    def access(key: str | None) -> Access:
        if key != "secret":
            raise UnauthenticatedError("give a key that is known: Authorization: Bearer KEY")
        return Access("id", (frozenset({"acme"}),))


class Counted:
    """Metrics that remember."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def observe(self, route: str, code: int, seconds: float, rows: int, customers: Sequence[str | None] = ()) -> None:
        assert seconds > 0 and len(customers) == rows
        self.seen.append((route, code, rows))

    def text(self) -> bytes:
        return b"# counted\n"


@pytest.fixture
def front(models: Models) -> Front:
    front = Front(models)
    front.life.begin()
    return front


@pytest.fixture
def client(front: Front) -> Iterator[TestClient]:
    with TestClient(make_app(front)) as client:
        yield client


def test_health_follows_the_life_of_the_server(front: Front, client: TestClient) -> None:
    paths = ("/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny/versions/1/ready")
    assert [client.get(path).status_code for path in paths] == [200, 200, 200, 200]
    front.life.drain()
    assert [client.get(path).status_code for path in paths] == [200, 503, 503, 503]
    # Who has not heard of it yet is still answered.
    assert client.post("/v1/classify", json=ASK).status_code == 200


def test_before_it_is_ready_a_server_answers_nothing(models: Models) -> None:
    with TestClient(make_app(Front(models))) as client:
        assert client.get("/v2/health/ready").status_code == 503
        reply = client.post("/v1/classify", json=ASK)
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1"


def test_metadata_of_the_protocol(client: TestClient, model: ServedModel) -> None:
    server = client.get("/v2").json()
    assert set(server) == {"name", "version", "extensions"} and "binary_tensor_data" in server["extensions"]
    for path in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
        record = client.get(path).json()
        assert (record["name"], record["versions"]) == ("tiny", ["1"])
        tensors = {item["name"]: (item["datatype"], item["shape"]) for item in record["inputs"] + record["outputs"]}
        assert tensors["text"] == ("BYTES", [-1]) and tensors["input_ids"] == ("INT64", [-1, -1])
        assert tensors["logits"] == ("FP32", [-1, -1]) and tensors["label"] == ("BYTES", [-1])
    assert record["parameters"]["base_digest"] == model.bundle.manifest.base_digest


def test_the_shapes_that_perf_analyzer_reads(client: TestClient) -> None:
    config = client.get("/v2/models/tiny/config").json()
    assert config["max_batch_size"] == 0
    needed = [item["name"] for item in config["input"] if not item["optional"]]
    assert needed == ["text"] and config["input"][0]["data_type"] == "TYPE_STRING"
    assert client.get("/v2/models/tiny/stats").json()["model_stats"][0]["last_inference"] == 0
    before_ms = time.time() * 1000 - 1
    assert client.post("/v1/classify", json={"texts": list(SENTENCES)}).status_code == 200
    for path in ("/v2/models/tiny/stats", "/v2/models/tiny/versions/1/stats", "/v2/models/stats"):
        (stats,) = client.get(path).json()["model_stats"]
        assert (stats["inference_count"], stats["execution_count"]) == (6, 1)
        assert before_ms <= stats["last_inference"] <= time.time() * 1000 + 1
        assert set(stats["inference_stats"]) >= {"success", "fail", "queue", "compute_infer"}
        assert all(set(value) == {"count", "ns"} for value in stats["inference_stats"].values())
        # Version 2.60.0 ends where these differ.
        assert [stats["inference_stats"][f"compute_{part}"]["count"] for part in ("input", "infer", "output")] == [
            1
        ] * 3


def test_the_index_of_models(front: Front, client: TestClient) -> None:
    assert client.post("/v2/repository/index").json() == [
        {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
    ]
    front.life.drain()
    assert client.post("/v2/repository/index", json={}).json()[0]["state"] == "UNAVAILABLE"
    assert client.post("/v2/repository/index", json={"ready": True}).json() == []


@pytest.mark.parametrize(
    ("method", "path", "code", "words"),
    [
        ("GET", "/v2/models/other", 404, "no model 'other'"),
        ("POST", "/v2/models/other/infer", 404, "no model 'other'"),
        ("GET", "/v2/models/tiny/versions/2", 404, "version 1 alone"),
        ("GET", "/nothing", 404, "is not there"),
        ("GET", "/v2/models/tiny/infer", 405, "is not asked that way"),
        ("DELETE", "/v2", 405, "is not asked that way"),
    ],
)
def test_what_is_not_there(client: TestClient, method: str, path: str, code: int, words: str) -> None:
    reply = client.request(method, path)
    assert reply.status_code == code and set(reply.json()) == {"error"} and words in reply.json()["error"]


def test_without_a_key_nothing_is_answered_but_health(models: Models) -> None:
    front = Front(models, keys=Keys())
    front.life.begin()
    with TestClient(make_app(front)) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            for method, path in (("POST", "/v1/classify"), ("GET", "/v2"), ("GET", "/v2/models/tiny/stats")):
                reply = client.request(method, path, headers=headers)
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
        assert client.get("/v2/health/ready").status_code == 200
        client.headers["authorization"] = "Bearer secret"
        assert client.post("/v1/classify", json=ASK).status_code == 200
        # One body, whether there is such a customer or not.
        replies = [client.post("/v1/classify", json=ASK | {"customer": name}) for name in ("beta", "nobody")]
        assert {reply.status_code for reply in replies} == {404} and len({reply.content for reply in replies}) == 1


def test_an_unknown_customer_without_keys_has_the_same_body(client: TestClient) -> None:
    reply = client.post("/v1/classify", json=ASK | {"customer": "nobody"})
    assert reply.status_code == 404 and "no customer of that name" in reply.json()["error"]


def test_requests_are_counted_by_route(models: Models) -> None:
    metrics = Counted()
    front = Front(models, metrics=metrics)
    front.life.begin()
    with TestClient(make_app(front)) as client:
        client.post("/v1/classify", json={"texts": list(SENTENCES)})
        client.post("/v2/models/tiny/infer", json={})
        assert client.get("/metrics").text == "# counted\n"
    assert metrics.seen[:2] == [("/v1/classify", 200, 6), ("/v2/models/{model}/infer", 400, 0)]


def test_an_error_of_our_own_shows_nothing_of_the_request(
    client: TestClient, model: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError(SENTENCES[0])

    monkeypatch.setattr(model.engine, "admit", fail)
    reply = client.post("/v1/classify", json=ASK)
    assert reply.status_code == 500 and SENTENCES[0] not in reply.text
    assert "KeyError" in caplog.text and SENTENCES[0] not in caplog.text


def test_openapi_describes_what_is_answered(client: TestClient, front: Front) -> None:
    document = client.get("/openapi.json").json()
    assert document == openapi() and document["openapi"].startswith("3.1")
    for reference in re.findall(r"'\$ref': '([^']+)'", str(document)):
        assert resolve(document, reference)
    for path, item in document["paths"].items():
        named = {parameter["name"] for parameter in item.get("parameters", []) if parameter["in"] == "path"}
        assert set(re.findall(r"{(\w+)}", path)) == named
        assert all(operation["responses"] for method, operation in item.items() if method in ("get", "post"))
    routes = {route.path for route in front.routes() if "versions" not in route.path}
    assert set(document["paths"]) == routes - {"/openapi.json", "/v2/", "/", "/live.css", "/live.js", "/live.svg"}
    for path, record in (
        ("/v1/classify", ASK),
        ("/v2/models/{model}/infer", {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}),
    ):
        operation = document["paths"][path]["post"]
        check(document, operation["requestBody"]["content"]["application/json"]["schema"], record)
        reply = client.post(path.replace("{model}", "tiny"), json=record)
        check(document, operation["responses"]["200"]["content"]["application/json"]["schema"], reply.json())
        reply = client.post(path.replace("{model}", "tiny"), json={})
        check(document, operation["responses"]["400"]["content"]["application/json"]["schema"], reply.json())


def resolve(document: Any, reference: str) -> Any:
    for name in reference.removeprefix("#/").split("/"):
        document = document[name]
    return document


KINDS = {"object": dict, "array": list, "string": str, "number": float | int, "integer": int, "null": type(None)}


def check(document: Any, schema: Any, value: Any) -> None:
    """Hold a value against a schema, as far as ours say something."""
    if "$ref" in schema:
        return check(document, resolve(document, schema["$ref"]), value)
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    assert not kinds or any(isinstance(value, KINDS[kind]) for kind in kinds), (schema, value)
    assert value in schema.get("enum", [value])
    if isinstance(value, dict):
        assert set(schema.get("required", [])) <= set(value), (schema, value)
        properties = schema.get("properties", {})
        if schema.get("additionalProperties") is False:
            assert set(value) <= set(properties)
        for name in set(properties) & set(value):
            check(document, properties[name], value[name])
    if isinstance(value, list):
        assert len(value) >= schema.get("minItems", 0)
        for item in value:
            check(document, schema.get("items", {}), item)
    return None
