"""A gRPC server from its start to its end: time that runs out, clients that go, health, reflection, certificates."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from qrlora_deploy.errors import InputError
from qrlora_deploy.serving.grpc.listening import GrpcLimits
from qrlora_deploy.serving.grpc.schema import SERVICE
from qrlora_deploy.serving.grpc.server import GrpcServer
from qrlora_deploy.serving.grpc.service import InferenceService
from tests.serving.grpc.client import Client, message, request, serving, texts
from tests.serving.grpc.compile_proto import compiled

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
ONE = request([texts(["one"])], ["label"], "acme")


class Gate(threading.Event):
    """Runs wait until it is set.

    Attributes:
        submitted: requests that the engine has.
    """

    submitted = 0


@pytest.fixture
def gate(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, predict, submit = Gate(), model.engine.session.predict, model.engine.submit

    def waiting(*arguments: Any) -> Any:
        assert gate.wait(60)
        return predict(*arguments)

    def counting(*arguments: Any) -> Any:
        gate.submitted += 1
        return submit(*arguments)

    monkeypatch.setattr(model.engine.session, "predict", waiting)
    monkeypatch.setattr(model.engine, "submit", counting)
    yield gate
    gate.set()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.005)


async def running(gate: Gate, client: Client, calls: int) -> list[Any]:
    """So many calls of one row, in the order in which the engine has them; the first one runs."""
    started = []
    for number in range(calls):
        started.append(client.call("ModelInfer", ONE))
        await until(lambda number=number: gate.submitted > number)
    return started


@pytest.mark.parametrize("by", ["gRPC", "parameter"])
def test_a_request_whose_time_passes_in_the_queue_is_not_run(
    service: InferenceService, gate: Gate, model: Any, by: str
) -> None:
    async def run() -> None:
        async with serving(service) as (_, client):
            (first,) = await running(gate, client, 1)
            late = request([texts(["two"])], ["label"])
            if by == "parameter":
                late.parameters["timeout"].int64_param = 200_000
            error = await client.error(late, timeout=0.2 if by == "gRPC" else 30)
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: service.running == 1)
            gate.set()
            assert len((await first).outputs) == 1
            await until(lambda: model.engine._admitted == 0)
            assert model.engine.stats().rows == 1

    asyncio.run(run())


def test_a_client_that_goes_takes_its_request_along(service: InferenceService, gate: Gate, model: Any) -> None:
    async def run() -> None:
        async with serving(service) as (_, client):
            first, second, third = await running(gate, client, 3)
            second.cancel()
            await until(lambda: service.running == 2)
            gate.set()
            assert len((await first).outputs) == len((await third).outputs) == 1
            await until(lambda: model.engine._admitted == 0)
            assert model.engine.stats().rows == 2

    asyncio.run(run())


def test_the_end_waits_for_what_is_being_answered(service: InferenceService, gate: Gate, model: Any) -> None:
    async def run() -> None:
        async with serving(service) as (server, client):
            stub = health_pb2_grpc.HealthStub(client.channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service="tiny"))
            assert (await watch.read()).status == SERVING
            started = await running(gate, client, 2)
            service.life.drain()
            assert (await watch.read()).status == NOT_SERVING
            assert not (await client.call("ServerReady", message("ServerReadyRequest"))).ready
            closing = asyncio.ensure_future(server.stop(60))
            await asyncio.sleep(0.1)
            assert (await client.error(ONE, timeout=10)).code() == grpc.StatusCode.UNAVAILABLE
            assert not closing.done()
            gate.set()
            assert [len((await call).outputs) for call in started] == [1, 1]
            # Those who watch the health do not hold it up.
            await asyncio.wait_for(closing, 10)
            assert not service.running

    asyncio.run(run())


def test_the_end_takes_up_calls_that_have_arrived_before_it(service: InferenceService) -> None:
    async def run() -> None:
        async with serving(service) as (server, client):
            await client.infer(ONE)
            calls = [client.call("ModelInfer", ONE) for _ in range(20)]
            # They are sent, and the loop has not come to them: a busy one, whose time to end is there.
            for _ in range(3):
                await asyncio.sleep(0)
            time.sleep(0.3)
            await server.stop(10)
            assert [len((await call).outputs) for call in calls] == [1] * 20

    asyncio.run(run())


def test_the_end_does_not_wait_for_ever(service: InferenceService, gate: Gate) -> None:
    async def run() -> None:
        async with serving(service) as (server, client):
            (call,) = await running(gate, client, 1)
            await server.stop(0.2)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert raised.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

    asyncio.run(run())


def test_more_calls_than_there_may_be_are_refused(service: InferenceService, gate: Gate) -> None:
    async def run() -> None:
        async with serving(service, limits=GrpcLimits(max_calls=2)) as (_, client):
            started = await running(gate, client, 2)
            assert (await client.error(ONE)).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            gate.set()
            for call in started:
                await call
            await client.infer(ONE)

    asyncio.run(run())


def test_health_follows_what_the_server_and_its_models_are(service: InferenceService, model: Any) -> None:
    async def run() -> None:
        server = GrpcServer(service)
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def becomes(status: int) -> None:
                for name in ("", SERVICE, "tiny"):
                    watch = stub.Watch(health_pb2.HealthCheckRequest(service=name))
                    async with asyncio.timeout(10):
                        while (await watch.read()).status != status:
                            pass
                    watch.cancel()
                    assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == status

            await becomes(NOT_SERVING)
            service.life.begin()
            await becomes(SERVING)
            model.engine.drain(0)
            await becomes(NOT_SERVING)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Check(health_pb2.HealthCheckRequest(service="other"))
            assert raised.value.code() == grpc.StatusCode.NOT_FOUND
        await server.stop(0)

    asyncio.run(run())


def test_reflection_gives_the_schema(service: InferenceService) -> None:
    async def run(stream: Callable[[grpc.aio.Channel], Any]) -> tuple[set[str], FileDescriptorProto]:
        async with serving(service) as (_, client):
            call = stream(client.channel)
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            services = {found.name for found in (await call.read()).list_services_response.service}
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
            file = (await call.read()).file_descriptor_response.file_descriptor_proto[0]
            await call.done_writing()
            return services, FileDescriptorProto.FromString(file)

    def newer(channel: grpc.aio.Channel) -> Any:
        return channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )()

    for stream in (lambda channel: reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(), newer):
        services, file = asyncio.run(run(stream))
        assert services >= {SERVICE, "grpc.health.v1.Health"}
        assert file == compiled().file[0]


def test_a_port_that_is_taken(service: InferenceService) -> None:
    async def run() -> None:
        async with serving(service) as (server, _):
            with pytest.raises(InputError, match=f"127.0.0.1:{server.port}"):
                await GrpcServer(service, port=server.port).start()

    asyncio.run(run())
