"""The gRPC server: what it offers, and its life."""

import asyncio
import time

import grpc

from qrlora_deploy.serving.grpc.health import Health, add_reflection
from qrlora_deploy.serving.grpc.listening import Certificates, GrpcLimits, listen
from qrlora_deploy.serving.grpc.service import InferenceService
from qrlora_deploy.serving.tls import Tls

LOOK_S = 0.01
"""Between two looks whether every call has been answered."""

QUIET_LOOKS, QUIET_S = 8, 1.0
"""No call begins between so many looks: then none is left that gRPC has and Python has not taken up, which would be
cancelled. After so many seconds of calls that go on coming nobody waits for that any more."""

GRACE_S = 0.5
"""For calls that never end, such as those that watch the health, once everything was answered."""


class GrpcServer:
    """A service over gRPC, with health and reflection: a `Companion` of the HTTP server.

    Its methods but `reload` belong to one event loop.

    Args:
        service: what answers.
        host: where it listens.
        port: 0: any that is free.
        tls: files of certificates; None: without encryption.
        limits: how much it takes at a time.
        is_shared: other processes of this server listen there, too.

    Attributes:
        port: where it listens, once it was started.

    Raises:
        InputError: a file of certificates cannot be used.
    """

    def __init__(
        self,
        service: InferenceService,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Tls | None = None,
        limits: GrpcLimits | None = None,
        is_shared: bool = False,
    ) -> None:
        self.host, self.port, self._is_shared = host, port, is_shared
        self._service = service
        self._limits = limits or GrpcLimits()
        self._certificates = None if tls is None else Certificates(tls)
        self._health = Health(service.models, service.life)
        self._server: grpc.aio.Server | None = None
        self._hurried = False

    async def start(self) -> None:
        """Listen.

        Raises:
            InputError: the address cannot be listened on.
        """
        limits = self._limits
        server = grpc.aio.server(options=limits.options(self._is_shared), maximum_concurrent_rpcs=limits.max_calls)
        server.add_generic_rpc_handlers((self._service,))
        self._health.add_to(server)
        add_reflection(server)
        self.port = listen(server, self.host, self.port, self._certificates, self._is_shared)
        await self._health.look()
        await server.start()
        self._following = asyncio.create_task(self._health.follow())
        self._server = server

    async def stop(self, grace_s: float) -> None:
        """Take no new call, and finish those that are being answered; what is left after `grace_s` is cancelled."""
        if self._server is None:
            return
        self._following.cancel()
        await self._health.end()
        await self._quiet(min(QUIET_S, grace_s))
        stopping = asyncio.ensure_future(self._server.stop(grace_s + GRACE_S))
        until = time.monotonic() + grace_s
        while self._service.running and time.monotonic() < until and not self._hurried:
            await asyncio.sleep(LOOK_S)
        # The grace that ends first counts.
        await self._server.stop(0 if self._service.running else GRACE_S)
        await stopping

    async def _quiet(self, within_s: float) -> None:
        """Wait until no call begins for a moment."""
        until, looks, begun = time.monotonic() + within_s, 0, self._service.begun
        while looks < QUIET_LOOKS and time.monotonic() < until and not self._hurried:
            await asyncio.sleep(LOOK_S)
            looks = looks + 1 if begun == self._service.begun else 0
            begun = self._service.begun

    def hurry(self) -> None:
        """Wait no longer in `stop`."""
        self._hurried = True

    def reload(self) -> None:
        """Read the files of certificates again, for connections from now on. From any thread.

        Raises:
            InputError: they cannot be used; those that were read before go on.
        """
        if self._certificates is not None:
            self._certificates.read()
