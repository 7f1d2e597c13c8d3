"""What gRPC refuses: the status of each reason, and the line that comes with it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from qrlora_deploy.serving.access import Access
from qrlora_deploy.serving.grpc.listening import GrpcLimits
from qrlora_deploy.serving.grpc.service import InferenceService
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.refusals import UnauthenticatedError
from tests.serving.grpc.client import Client, asking, message, request, serving, texts

NOT_FOUND = grpc.StatusCode.NOT_FOUND


def test_names_that_there_are_not(service: InferenceService) -> None:
    async def ask(client: Client) -> list[grpc.aio.AioRpcError]:
        model, version = request([texts(["a"])]), request([texts(["a"])], model_version="2")
        model.model_name = "other"
        ready = message("ModelReadyRequest", name="other")
        return [
            await client.error(model),
            await client.error(version),
            await client.error(ready, "ModelReady"),
            await client.error(request([texts(["a"])], customer="nobody")),
        ]

    errors = asking(service, ask)
    assert [error.code() for error in errors] == [NOT_FOUND] * 4
    assert "'other'" in errors[0].details() and "version" in errors[1].details()


def test_no_key_no_answer(service: InferenceService) -> None:
    class OneKey:
        def access(self, key: str | None) -> Access:
            if key != "secret":
                raise UnauthenticatedError("no key")
            return Access("one", (frozenset({"acme"}),))

    service.keys = OneKey()

    async def ask() -> list[Any]:
        async with serving(service) as (_, client):
            sent = request([texts(["a"])], ["label"], "acme")
            right = {"metadata": (("authorization", "Bearer secret"),)}
            await client.infer(sent, **right)
            assert (await client.call("ServerReady", message("ServerReadyRequest"))).ready
            strange, nobody = (request([texts(["a"])], customer=name) for name in ("beta", "nobody"))
            return [
                await client.error(sent),
                await client.error(sent, metadata=(("authorization", "Bearer other"),)),
                await client.error(sent, metadata=(("authorization", "Basic secret"),)),
                await client.error(message("ServerMetadataRequest"), "ServerMetadata"),
                await client.error(b"\xff", "ModelInfer"),
                await client.error(strange, **right),
                await client.error(nobody, **right),
            ]

    *refused, strange, nobody = asyncio.run(ask())
    assert [error.code() for error in refused] == [grpc.StatusCode.UNAUTHENTICATED] * 5
    assert strange.code() == nobody.code() == NOT_FOUND and strange.details() == nobody.details()


def test_a_full_queue_says_when_to_come_again(service: InferenceService, model: Any) -> None:
    async def ask(client: Client) -> grpc.aio.AioRpcError:
        model.engine.max_rows = 1
        try:
            return await client.error(request([texts(["a", "b"])]))
        finally:
            model.engine.max_rows = 4096

    error = asking(service, ask)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    found = dict(error.trailing_metadata())
    assert found.pop("x-request-id") and found == {"retry-after": "1", "grpc-retry-pushback-ms": "1000"}


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_over_the_limit_is_refused_however_it_comes(
    service: InferenceService, compression: grpc.Compression
) -> None:
    async def ask(client: Client) -> grpc.aio.AioRpcError:
        assert await client.infer(request([texts(["a" * 1000])]), compression=compression)
        return await client.error(request([texts(["a" * 100_000])]), compression=compression)

    error = asking(service, ask, limits=GrpcLimits(max_message_bytes=10_000))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_what_fails_within_tells_nothing_of_it(
    service: InferenceService, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "text of a customer"

    def broken(inputs: Any, owners: Any) -> Any:
        raise ValueError(secret)

    async def ask(client: Client) -> grpc.aio.AioRpcError:
        with monkeypatch.context() as patch:
            patch.setattr(model.engine.session, "predict", broken)
            return await client.error(request([texts(["a"])]))

    error = asking(service, ask)
    assert error.code() == grpc.StatusCode.INTERNAL
    assert secret not in error.details() and secret not in caplog.text and "ValueError" in caplog.text


def test_requests_before_the_server_is_ready(service: InferenceService) -> None:
    async def ask(client: Client) -> grpc.aio.AioRpcError:
        began, service.life = service.life, Life()
        try:
            return await client.error(request([texts(["a"])]))
        finally:
            service.life = began

    assert asking(service, ask).code() == grpc.StatusCode.UNAVAILABLE


def test_calls_are_counted_and_logged_by_the_clients_id(
    service: InferenceService, models: Any, caplog: pytest.LogCaptureFixture
) -> None:
    service.metrics = Metrics(list(models), ["acme"])

    async def ask(client: Client) -> list[Any]:
        with_id = {"metadata": (("x-request-id", "one-of-mine"),)}
        call = client.call("ModelInfer", request([texts(["a secret"] * 3)], customer="acme"), **with_id)
        await call
        return [await call.trailing_metadata(), (await client.error(request([]), **with_id)).trailing_metadata()]

    with caplog.at_level("INFO", "qrlora_deploy.access"):
        for metadata in asking(service, ask):
            assert dict(metadata) == {"x-request-id": "one-of-mine"}
    route = "/inference.GRPCInferenceService/ModelInfer"
    text = service.metrics.text().decode()
    assert f'qrlora_requests_total{{code="200",route="{route}"}} 2.0' in text
    assert f'qrlora_requests_total{{code="400",route="{route}"}} 1.0' in text
    assert 'qrlora_customer_rows_total{customer="acme"} 3.0' in text
    fields = [found for record in caplog.records if (found := record.fields)["request_id"] == "one-of-mine"]
    assert [(found["status"], found["rows"], found["method"]) for found in fields] == [
        (200, 3, "grpc"),
        (400, 0, "grpc"),
    ]
    assert "secret" not in caplog.text


def test_what_there_is_no_room_for_is_refused_before_its_message_is_read(service: InferenceService, model: Any) -> None:
    async def ask() -> list[Any]:
        async with serving(service) as (_, client):
            call = client.channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")(timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            live = await client.call("ServerLive", message("ServerLiveRequest"))
            return [raised.value.code(), live.live]

    model.engine.max_rows = 0
    try:
        assert asyncio.run(ask()) == [grpc.StatusCode.RESOURCE_EXHAUSTED, True]
    finally:
        model.engine.max_rows = 4096


def test_a_call_without_a_key_is_refused_before_its_message_is_read(
    service: InferenceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoKeys:
        def access(self, key: str | None) -> Access:
            raise UnauthenticatedError("no key")

    monkeypatch.setattr(service, "keys", NoKeys())

    async def ask() -> list[Any]:
        async with serving(service) as (_, client):
            # The message never ends: nobody could have read it.
            call = client.channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")(timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            large = request([texts(["a" * 2**20] * 10)])
            return [raised.value, await client.error(large), await client.error(request([]))]

    assert [error.code() for error in asyncio.run(ask())] == [grpc.StatusCode.UNAUTHENTICATED] * 3


def test_large_messages_that_are_held_are_bounded(service: InferenceService, model: Any) -> None:
    submit, held = model.engine.submit, asyncio.Event()

    async def ask(client: Client) -> grpc.aio.AioRpcError:
        loop = asyncio.get_running_loop()

        def late(ticket: Any, rows: Any) -> Any:
            loop.call_soon_threadsafe(held.set)
            return submit(ticket, rows)

        model.engine.submit = late
        service.max_held_bytes = 1000
        with stopped(model):
            first = client.call("ModelInfer", request([texts(["a" * 2000])], ["label"]))
            await asyncio.wait_for(held.wait(), 20)
            error = await client.error(request([texts(["b"])], ["label"]))
        assert len((await first).outputs) == 1
        return error

    assert asking(service, ask).code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@contextmanager
def stopped(model: Any) -> Iterator[None]:
    """Nothing is run within."""
    opened, predict = threading.Event(), model.engine.session.predict
    model.engine.session.predict = lambda *arguments: (opened.wait(60), predict(*arguments))[1]
    try:
        yield
    finally:
        opened.set()
        model.engine.session.predict = predict
