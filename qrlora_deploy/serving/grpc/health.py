"""gRPC's own services beside the protocol: health, and reflection from the protocol's own pool."""

from collections.abc import Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from qrlora_deploy.serving.grpc.schema import SERVICE, make_pool

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
"""The name that newer tools ask for first; its messages are those of v1alpha."""

SERVICES = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)


class Health:
    """What `grpc.health.v1.Health` says of the server (`""`), of the protocol's service and of each model."""

    def __init__(self, models: Iterable[str]) -> None:
        self._servicer = health.aio.HealthServicer()
        self._names = ("", SERVICE, *models)

    async def add_to(self, server: grpc.aio.Server) -> None:
        """Offer it; it says NOT_SERVING until `serving`."""
        for name in self._names:
            await self._servicer.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def serving(self) -> None:
        """Say SERVING of everything."""
        for name in self._names:
            await self._servicer.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def not_serving(self) -> None:
        """Say NOT_SERVING of everything from now on, to those too who watch."""
        await self._servicer.enter_graceful_shutdown()


def add_reflection(server: grpc.aio.Server) -> None:
    """Offer reflection under both of its names, of all services."""
    pool = make_pool()
    for module in (health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    servicer = reflection.aio.ReflectionServicer(SERVICES, pool=pool)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))
