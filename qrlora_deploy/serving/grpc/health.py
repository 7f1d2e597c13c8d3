"""gRPC's own services beside the protocol: health, and reflection from the protocol's own pool."""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from qrlora_deploy.serving.grpc.schema import SERVICE, make_pool
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.served import Models

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
"""The name that newer tools ask for first; its messages are those of v1alpha."""

LOOK_S = 0.05
"""Between two looks whether the models are ready."""

SERVICES = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)


_STATUS = {True: health_pb2.HealthCheckResponse.SERVING, False: health_pb2.HealthCheckResponse.NOT_SERVING}


class Health(health.aio.HealthServicer):
    """What `grpc.health.v1.Health` says: of each model by its name, and of all of them as `""` and as the protocol's
    service."""

    def __init__(self, models: Models, life: Life) -> None:
        super().__init__()
        self._models, self._life = models, life
        self._told: dict[str, bool] = {}

    def add_to(self, server: grpc.aio.Server) -> None:
        """Offer it."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """What is so at this moment."""
        await self.look()
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        """What is so at this moment, and each change."""
        await self.look()
        await super().Watch(request, context)

    async def look(self) -> None:
        """Tell what has changed, to those too who watch."""
        ready = {model.name: self._life.ready and model.ready for model in self._models}
        for name, is_ready in {**ready, "": all(ready.values()), SERVICE: all(ready.values())}.items():
            if self._told.get(name) is not is_ready:
                self._told[name] = is_ready
                await self.set(name, _STATUS[is_ready])

    async def follow(self) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def end(self) -> None:
        """Say NOT_SERVING of everything, for ever."""
        await self.enter_graceful_shutdown()


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
