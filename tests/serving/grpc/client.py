"""A client of the protocol that shares nothing with the server: its messages are those of `compile_proto`, in a pool of
the client's own."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool

from qrlora_deploy.serving.grpc.server import GrpcServer
from qrlora_deploy.serving.grpc.service import InferenceService
from tests.serving.grpc.compile_proto import compiled

POOL = DescriptorPool()
for _file in compiled().file:
    POOL.Add(_file)
SERVICE = POOL.FindServiceByName("inference.GRPCInferenceService")


def message(kind: str, /, **fields: Any) -> Any:
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"inference.{kind}"))(**fields)


class Client:
    """Calls by name, over a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    def call(self, method: str, request: Any, timeout: float | None = 30, **options: Any) -> Any:
        found = SERVICE.methods_by_name[method]
        stub = self.channel.unary_unary(
            f"/{SERVICE.full_name}/{method}",
            request_serializer=lambda sent: sent if isinstance(sent, bytes) else sent.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(found.output_type).FromString,
        )
        return stub(request, timeout=timeout, **options)

    async def infer(self, request: Any, **options: Any) -> Any:
        return await self.call("ModelInfer", request, **options)

    async def error(self, request: Any, method: str = "ModelInfer", **options: Any) -> grpc.aio.AioRpcError:
        """The error that a call ends with."""
        try:
            reply = await self.call(method, request, **options)
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError(f"the call was answered: {reply}")


@asynccontextmanager
async def serving(service: InferenceService, **options: Any) -> AsyncIterator[tuple[GrpcServer, Client]]:
    """A server on a free port of this machine, ready, and a client of it."""
    server = GrpcServer(service, **options)
    service.life.begin()
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield server, Client(channel)
    finally:
        await server.stop(0)


def request(inputs: Sequence[Any], outputs: Sequence[str] = (), customer: str | None = None, **fields: Any) -> Any:
    """A `ModelInferRequest` for the model `tiny`."""
    found = message("ModelInferRequest", model_name="tiny", inputs=inputs, **fields)
    for name in outputs:
        found.outputs.add(name=name)
    if customer is not None:
        found.parameters["customer"].string_param = customer
    return found


def tensor(name: str, datatype: str, shape: Sequence[int], **contents: Any) -> Any:
    """An input with its contents, or without."""
    found = message("ModelInferRequest").inputs.add(name=name, datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(found.contents, field).extend(values)
    return found


def texts(values: Sequence[str], name: str = "text") -> Any:
    return tensor(name, "BYTES", [len(values)], bytes_contents=[value.encode() for value in values])


def raw_texts(values: Sequence[str]) -> bytes:
    return b"".join(len(value.encode()).to_bytes(4, "little") + value.encode() for value in values)


def raw_request(tensors: Sequence[tuple[str, str, Sequence[int], bytes]], **options: Any) -> Any:
    """A request with the elements of all inputs in `raw_input_contents`."""
    found = request([tensor(name, datatype, shape) for name, datatype, shape, _ in tensors], **options)
    found.raw_input_contents.extend(raw for *_, raw in tensors)
    return found


def outputs_of(reply: Any) -> dict[str, np.ndarray]:
    """The outputs as arrays, whichever way they came."""
    return {output.name: _array(reply, number, output) for number, output in enumerate(reply.outputs)}


def _array(reply: Any, number: int, output: Any) -> np.ndarray:
    if output.datatype == "BYTES":
        values = (
            _split(reply.raw_output_contents[number]) if reply.raw_output_contents else output.contents.bytes_contents
        )
        array = np.array([value.decode() for value in values], dtype=object)
    elif reply.raw_output_contents:
        dtype = {"FP32": "<f4", "FP16": "<f2"}[output.datatype]
        array = np.frombuffer(reply.raw_output_contents[number], dtype=dtype)
    else:
        assert output.datatype == "FP32"
        array = np.array(output.contents.fp32_contents, dtype=np.float32)
    return array.reshape(tuple(output.shape))


def _split(raw: bytes) -> list[bytes]:
    found = []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        found.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return found


def asking(service: InferenceService, ask: Callable[[Client], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    """What `ask` gives, of a client of a running server that is well afterwards."""

    async def run() -> Any:
        async with serving(service, **options) as (_, client):
            found = await ask(client)
            assert len((await client.infer(request([texts(["fine"])], ["label"]))).outputs) == 1
            return found

    return asyncio.run(run())
