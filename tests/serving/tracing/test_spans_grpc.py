"""Spans over gRPC: traceparent in the metadata, statuses, and calls that are given up."""

import asyncio
import threading
from typing import Any

import pytest

pytest.importorskip("grpc", reason="needs the extra serve")
pytest.importorskip("grpc_tools", reason="needs grpcio-tools, whose compiler makes the client's messages")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import rpc_attributes
from opentelemetry.trace import StatusCode

from qrlora_deploy.serving.access import Access
from qrlora_deploy.serving.grpc.service import InferenceService
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.live.totals import RequestCounts
from qrlora_deploy.serving.refusals import UnauthenticatedError
from qrlora_deploy.serving.served import Models, ServedModel
from qrlora_deploy.serving.tracing.spans import Tracing
from tests.serving.grpc.client import Client, message, request, serving, texts
from tests.serving.tracing.looking import PARENT, STAGES, TRACE, TRACEPARENT, request_and_stages

METHOD = "inference.GRPCInferenceService/ModelInfer"


class Keys:
    """One key."""

    @staticmethod
    def access(key: str | None) -> Access:
        if key != "secret":
            raise UnauthenticatedError("give a key that is known")
        return Access("id")


@pytest.fixture
def service(models: Models, tracing: Tracing) -> InferenceService:
    return InferenceService(models, Life(), tracing=tracing)


def asking(service: InferenceService, *calls: Any) -> list[Any]:
    """What each call gives, one after the other."""

    async def run() -> list[Any]:
        async with serving(service) as (_, client):
            return [await call(client) for call in calls]

    return asyncio.run(run())


def test_the_parent_comes_with_the_metadata(service: InferenceService, exporter: InMemorySpanExporter) -> None:
    asked = request([texts(["a text", "another"])], ["label"], customer="acme")
    metadata = (("traceparent", TRACEPARENT), ("x-request-id", "order-7"), ("blob-bin", b"\x00\xff"))
    asking(
        service,
        lambda client: client.infer(asked, metadata=metadata),
        lambda client: client.call("ServerLive", message("ServerLiveRequest")),
    )
    span, stages = request_and_stages(exporter)
    assert span.name == METHOD and span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    # This engine says nothing of its runs.
    assert [stage.name for stage in stages] == [name for name in STAGES if name != "run"]
    assert dict(span.attributes or {}) | {"qrlora.tokens": 0} == {
        rpc_attributes.RPC_SYSTEM_NAME: rpc_attributes.RpcSystemNameValues.GRPC.value,
        rpc_attributes.RPC_METHOD: METHOD,
        rpc_attributes.RPC_RESPONSE_STATUS_CODE: "OK",
        "qrlora.request_id": "order-7",
        "qrlora.model": "tiny",
        "qrlora.rows": 2,
        "qrlora.tokens": 0,
        "qrlora.customers": 1,
        "qrlora.customer": ("acme",),
    }


def test_a_bad_traceparent_is_ignored(service: InferenceService, exporter: InMemorySpanExporter) -> None:
    asked = request([texts(["a text"])], ["label"])
    asking(service, lambda client: client.infer(asked, metadata=(("traceparent", "00-zz-zz-01"),)))
    assert request_and_stages(exporter)[0].parent is None


def test_refusals_and_failures(service: InferenceService, exporter: InMemorySpanExporter, model: ServedModel) -> None:
    counts = service.counts
    for asked, status, reason in (
        (request([texts(["a"])], customer="nobody"), "NOT_FOUND", "unknown_customer"),
        (request([]), "INVALID_ARGUMENT", "malformed_input"),
        (b"\xff\xff\xff", "INVALID_ARGUMENT", "malformed_input"),
    ):
        (error,) = asking(service, lambda client, asked=asked: client.error(asked))
        span, _ = request_and_stages(exporter)
        assert error.code().name == status == (span.attributes or {})[rpc_attributes.RPC_RESPONSE_STATUS_CODE]
        assert (span.attributes or {})["qrlora.refused"] == reason and span.status.status_code is StatusCode.UNSET
    model.engine.drain(5)
    asking(service, lambda client: client.error(request([texts(["a"])])))
    span, _ = request_and_stages(exporter)
    assert (span.attributes or {})[rpc_attributes.RPC_RESPONSE_STATUS_CODE] == "UNAVAILABLE"
    assert span.status.status_code is StatusCode.ERROR and (span.attributes or {})["error.type"] == "not_ready"
    assert counts.totals().refused == {"unknown_customer": 1, "malformed_input": 2, "not_ready": 1}


def test_without_a_key(models: Models, tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    service = InferenceService(models, Life(), keys=Keys(), tracing=tracing, counts=RequestCounts())
    asking(service, lambda client: client.error(request([texts(["a"])])))
    span, stages = request_and_stages(exporter)
    assert (span.attributes or {})[rpc_attributes.RPC_RESPONSE_STATUS_CODE] == "UNAUTHENTICATED" and stages == []
    assert service.counts.totals().refused == {"unauthenticated": 1}


def test_a_call_that_is_given_up(
    service: InferenceService, exporter: InMemorySpanExporter, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, held = threading.Event(), threading.Event()
    predict = model.engine.session.predict  # type: ignore[attr-defined]

    def slow(*arguments: Any) -> Any:
        began.set()
        assert held.wait(30)
        return predict(*arguments)

    async def give_up(client: Client) -> None:
        call = client.call("ModelInfer", request([texts(["a"])]))
        assert await asyncio.to_thread(began.wait, 30)
        call.cancel()
        while not exporter.get_finished_spans()[2:]:
            await asyncio.sleep(0.01)
        held.set()

    monkeypatch.setattr(model.engine.session, "predict", slow)  # type: ignore[attr-defined]
    asking(service, give_up)
    span, stages = request_and_stages(exporter)
    assert (span.attributes or {})[rpc_attributes.RPC_RESPONSE_STATUS_CODE] == "CANCELLED"
    assert [stage.name for stage in stages] == ["admit", "tokenise", "wait"]
    assert service.counts.totals().refused == {"gone": 1} and span.status.status_code is StatusCode.UNSET
