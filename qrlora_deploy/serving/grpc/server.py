"""The gRPC server: what it offers, and its life."""

import asyncio
import time

import grpc

from qrlora_deploy.serving.grpc.health import Health, add_reflection
from qrlora_deploy.serving.grpc.listening import GrpcLimits, GrpcTls, listen
from qrlora_deploy.serving.grpc.service import InferenceService

LOOK_S = 0.01
"""Between two looks whether every call has been answered."""

GRACE_S = 0.5
"""For calls that never end, such as those that watch the health, once everything was answered."""


class GrpcServer:
    """A service over gRPC, with health and reflection. Its methods belong to one event loop.

    Args:
        service: what answers.
        limits: how much it takes at a time.
        tls: certificates; None: without encryption.
    """

    def __init__(self, service: InferenceService, limits: GrpcLimits | None = None, tls: GrpcTls | None = None) -> None:
        self.service = service
        self.limits = limits or GrpcLimits()
        self.tls = tls
        self.health = Health(model.name for model in service.models)
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen; health says NOT_SERVING until `serving` is called.

        Returns:
            The port, which is a free one where 0 was asked for.

        Raises:
            InputError: the address cannot be listened on, or a file of certificates cannot be used.
        """
        server = grpc.aio.server(options=self.limits.options(), maximum_concurrent_rpcs=self.limits.max_calls)
        server.add_generic_rpc_handlers((self.service.handler(),))
        await self.health.add_to(server)
        add_reflection(server)
        port = listen(server, host, port, self.tls)
        await server.start()
        self._server = server
        return port

    async def serving(self) -> None:
        """Everything is loaded: health says so."""
        await self.health.serving()

    async def not_serving(self) -> None:
        """The end begins: health says so, for ever. Requests are still answered."""
        await self.health.not_serving()

    async def close(self, timeout_s: float) -> bool:
        """Take no new call, and wait for those that are being answered.

        Args:
            timeout_s: after so long they are cancelled.

        Returns:
            Whether all were answered.
        """
        await self.health.not_serving()
        if self._server is None:
            return True
        stopping = asyncio.ensure_future(self._server.stop(timeout_s + GRACE_S))
        until = time.monotonic() + timeout_s
        while self.service.running and time.monotonic() < until:
            await asyncio.sleep(LOOK_S)
        answered = not self.service.running
        # The first of two graces that ends is the one that counts.
        await self._server.stop(GRACE_S if answered else 0)
        await stopping
        return answered
