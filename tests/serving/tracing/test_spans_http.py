"""Spans over HTTP as an exporter gets them: parents, order, refusals, and what they never hold."""

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv.attributes import error_attributes, http_attributes, url_attributes
from opentelemetry.trace import StatusCode

from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.access import Access
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.json_log import FIELDS
from qrlora_deploy.serving.refusals import UnauthenticatedError
from qrlora_deploy.serving.served import Models, ServedModel
from qrlora_deploy.serving.tokenizing import RowTokenizer
from qrlora_deploy.serving.tracing.spans import Tracing
from tests.serving.tracing.looking import (
    NO_TRACEPARENTS,
    PARENT,
    STAGES,
    TRACE,
    TRACEPARENT,
    check_order,
    request_and_stages,
)
from tests.tiny import SENTENCES

pytest.importorskip("httpx", reason="needs the extra client")
from starlette.testclient import TestClient

ASK = {"texts": list(SENTENCES), "customers": ["acme", "beta", "beta", "acme", None, "beta"]}


class Keys:
    """One key."""

    @staticmethod
    def access(key: str | None) -> Access:
        if key != "secret":
            raise UnauthenticatedError("give a key that is known")
        return Access("id")


@pytest.fixture
def model(session: SwitchableSession, customers: dict[str, Coefficients]) -> Iterator[ServedModel]:
    """With the engine that servers have."""
    for name, customer in customers.items():
        session.load(name, customer)
    with LocalEngine(session) as engine:
        yield ServedModel("tiny", session.bundle, engine, RowTokenizer(session.bundle))


@pytest.fixture
def front(models: Models, tracing: Tracing) -> Front:
    front = Front(models, tracing=tracing)
    front.life.begin()
    return front


@pytest.fixture
def client(front: Front) -> Iterator[TestClient]:
    with TestClient(make_app(front), raise_server_exceptions=False) as client:
        yield client


def test_the_parent_is_the_clients_and_the_stages_follow_one_another(
    client: TestClient, exporter: InMemorySpanExporter, model: ServedModel
) -> None:
    headers = {"traceparent": TRACEPARENT, "x-request-id": "order-7"}
    assert client.post("/v1/classify", json=ASK, headers=headers).status_code == 200
    request, stages = request_and_stages(exporter)
    assert request.name == "POST /v1/classify" and request.parent is not None and request.parent.is_remote
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, PARENT)
    assert [span.name for span in stages] == STAGES
    check_order(request, stages)
    rows = model.tokenizer.rows(list(SENTENCES), None, ASK["customers"])  # type: ignore[arg-type]
    assert dict(request.attributes or {}) == {
        http_attributes.HTTP_REQUEST_METHOD: "POST",
        http_attributes.HTTP_ROUTE: "/v1/classify",
        http_attributes.HTTP_RESPONSE_STATUS_CODE: 200,
        url_attributes.URL_PATH: "/v1/classify",
        url_attributes.URL_SCHEME: "http",
        "qrlora.request_id": "order-7",
        "qrlora.model": "tiny",
        "qrlora.rows": 6,
        "qrlora.tokens": sum(row.length for row in rows),
        "qrlora.customers": 3,
        "qrlora.customer": ("acme",),
    }
    run = dict(stages[3].attributes or {})
    # A free engine begins with what is there, so one request may be more than one batch.
    assert run["qrlora.batches"] >= 1 and run["qrlora.batch.rows"] >= 6  # type: ignore[operator]
    stats = model.engine.stats()
    assert (run["qrlora.batches"], run["qrlora.batch.padded_tokens"]) == (stats.batches, stats.padded_tokens)
    assert all(span.status.status_code is StatusCode.UNSET for span in (request, *stages))
    run_ns = sum((stages[3].end_time or 0, -(stages[3].start_time or 0)))
    assert run_ns / 1e9 >= stats.run_s * 0.99


@pytest.mark.parametrize("traceparent", NO_TRACEPARENTS, ids=range(len(NO_TRACEPARENTS)))
def test_a_bad_traceparent_is_ignored(client: TestClient, exporter: InMemorySpanExporter, traceparent: str) -> None:
    assert client.post("/v1/classify", json=ASK, headers={"traceparent": traceparent}).status_code == 200
    request, stages = request_and_stages(exporter)
    assert request.parent is None and len(stages) == len(STAGES)


def test_who_does_not_trace_and_what_is_not_sampled_has_no_spans(
    client: TestClient, exporter: InMemorySpanExporter
) -> None:
    unsampled = TRACEPARENT.removesuffix("01") + "00"
    assert client.post("/v1/classify", json=ASK, headers={"traceparent": unsampled}).status_code == 200
    for path in ("/v2/health/ready", "/v2", "/v2/models/tiny/stats", "/", "/live.json"):
        assert client.get(path).status_code == 200
    assert exporter.get_finished_spans() == ()


def test_a_sampler_that_wants_nothing(models: Models) -> None:
    assert Tracing(TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)).begin("request", {}, {}) is None
    assert Front(models).tracing is None


@pytest.mark.parametrize(
    ("record", "code", "reason", "stages"),
    [
        ({"texts": ["a"], "customer": "nobody"}, 404, "unknown_customer", ["admit", "tokenise", "wait"]),
        ({"texts": []}, 400, "malformed_input", ["admit"]),
        ({"texts": "no list"}, 400, "malformed_input", []),
        ({"texts": ["a"], "model": "other"}, 404, "not_found", []),
        ({"texts": ["a"] * 5000}, 413, "too_large", ["admit"]),
    ],
)
def test_a_refusal_ends_the_stage_that_refused(
    client: TestClient, exporter: InMemorySpanExporter, record: Any, code: int, reason: str, stages: list[str]
) -> None:
    assert client.post("/v1/classify", content=json.dumps(record)).status_code == code
    request, found = request_and_stages(exporter)
    assert [span.name for span in found] == stages
    for span in (request, *found[-1:]):
        # A client's mistake is no error of the server, by the conventions.
        assert (span.attributes or {})["qrlora.refused"] == reason and span.status.status_code is StatusCode.UNSET
        assert error_attributes.ERROR_TYPE not in (span.attributes or {})
    assert (request.attributes or {})[http_attributes.HTTP_RESPONSE_STATUS_CODE] == code


def test_token_ids_that_the_model_has_no_row_for(client: TestClient, exporter: InMemorySpanExporter) -> None:
    ids = {"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 10**7]}
    assert client.post("/v2/models/tiny/infer", json={"inputs": [ids]}).status_code == 400
    request, stages = request_and_stages(exporter)
    assert request.name == "POST /v2/models/{model}/infer" and [span.name for span in stages] == ["admit", "tokenise"]
    assert (stages[1].attributes or {})["qrlora.refused"] == "malformed_input"
    assert "qrlora.refused" not in (stages[0].attributes or {})


def test_what_the_server_cannot_do_is_an_error(
    client: TestClient, exporter: InMemorySpanExporter, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.engine.drain(5)
    assert client.post("/v1/classify", json=ASK).status_code == 503

    def fail(*_: Any) -> None:
        raise KeyError(SENTENCES[0])

    request, (admit,) = request_and_stages(exporter)
    for span in (request, admit):
        assert span.status.status_code is StatusCode.ERROR and span.status.description is None
        assert (span.attributes or {})[error_attributes.ERROR_TYPE] == "not_ready"
    monkeypatch.setattr(model.engine, "admit", fail)
    assert client.post("/v1/classify", json=ASK).status_code == 500
    request, _ = request_and_stages(exporter)
    assert (request.attributes or {})[error_attributes.ERROR_TYPE] == "failed" and not request.events
    assert SENTENCES[0] not in request.to_json()


def test_a_deadline_that_passes_in_the_queue(
    client: TestClient, exporter: InMemorySpanExporter, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, answer = threading.Event(), model.engine._model.answer  # type: ignore[attr-defined]

    def slow(*arguments: Any) -> Any:
        assert held.wait(30)
        return answer(*arguments)

    monkeypatch.setattr(model.engine._model, "answer", slow)  # type: ignore[attr-defined]
    reply = client.post("/v1/classify", json=ASK, headers={"x-request-timeout-ms": "100"})
    held.set()
    assert reply.status_code == 504
    request, stages = request_and_stages(exporter)
    assert [span.name for span in stages] == ["admit", "tokenise", "wait"]
    assert (request.attributes or {})["error.type"] == "deadline" and request.status.status_code is StatusCode.ERROR


def test_without_a_key_there_is_a_span_and_nothing_in_it(
    models: Models, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    front = Front(models, keys=Keys(), tracing=tracing)
    front.life.begin()
    with TestClient(make_app(front)) as client:
        assert client.post("/v1/classify", json=ASK, headers={"authorization": "Bearer wrong"}).status_code == 401
    request, stages = request_and_stages(exporter)
    assert (request.attributes or {})["qrlora.refused"] == "unauthenticated" and stages == []
    assert "wrong" not in request.to_json() and "qrlora.customers" not in (request.attributes or {})


def test_no_text_no_key_and_no_customer_but_those_on_the_list(
    client: TestClient, exporter: InMemorySpanExporter
) -> None:
    client.post("/v1/classify", json=ASK, headers={"authorization": "Bearer geheim", "cookie": "a=geheim"})
    client.post("/v2/models/secret-model/infer", json={"inputs": []})
    client.post("/v1/classify", json={"texts": ["a"], "customer": "nobody-of-that-name"})
    told = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "acme" in told and "/v2/models/{model}/infer" in told
    for secret in ("beta", "geheim", "secret-model", "nobody-of-that-name", *SENTENCES):
        assert secret not in told


def test_the_log_names_the_trace(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qrlora_deploy.access")
    client.post("/v1/classify", json=ASK, headers={"traceparent": TRACEPARENT})
    client.get("/v2")
    traced, other = [getattr(record, FIELDS) for record in caplog.records if record.name == "qrlora_deploy.access"]
    assert traced["trace_id"] == TRACE and "trace_id" not in other
