"""A whole server, put together: models, keys, quotas, fronts and the admin API."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.http.listener import HttpListener
from qrlora_deploy.serving.opened import OpenedFront
from qrlora_deploy.serving.opening import ModelPlaces, OpenModel, RunOptions
from qrlora_deploy.serving.server import Companion, Server, ServerOptions


@dataclass(frozen=True)
class AssemblyOptions:
    """What a server is made of.

    Attributes:
        places: of the models; the first one answers where a request names none.
        run: how they run.
        server: where the HTTP front listens, and how the process ends.
        keys: file of keys; None: everybody is answered.
        grpc_port: None: without gRPC.
        admin_port: None: without the admin API.
        admin_host: where the admin API listens.
        audit_log: file that changes by the admin API are told to.
        counted: customers whose rows metrics tell by name.

    Raises:
        InputError: the admin API is asked for without keys or audit log.
    """

    places: Sequence[ModelPlaces]
    run: RunOptions = field(default_factory=RunOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    keys: Path | None = None
    grpc_port: int | None = None
    admin_port: int | None = None
    admin_host: str = "127.0.0.1"
    audit_log: Path | None = None
    counted: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.admin_port is not None and (self.keys is None or self.audit_log is None):
            raise InputError(f"{argument('admin_port')} needs {argument('keys')} and {argument('audit_log')}")


class Assembly:
    """Everything that a server needs, open; nothing answers yet.

    Attributes:
        server: to be run.
        companions: by what they are called: "gRPC" and "admin API".

    Raises:
        QrloraError: something cannot be used; what was opened before is closed.
    """

    def __init__(self, options: AssemblyOptions) -> None:
        self._opened: OpenedFront | None = None
        self.companions: dict[str, Companion] = {}
        try:
            self._open(options)
        except BaseException:
            self.close()
            raise

    @property
    def models(self) -> list[OpenModel]:
        """Open; none after `close`."""
        return self._opened.models if self._opened is not None else []

    def _open(self, options: AssemblyOptions) -> None:
        self._opened = opened = OpenedFront(options.places, options.run, options.keys, options.counted)
        front = opened.front
        if options.grpc_port is not None:
            self.companions["gRPC"] = _grpc(front, options.server, options.grpc_port)
        if options.admin_port is not None:
            self.companions["admin API"] = self._admin(opened, options)
        self.server = Server(front, options.server, self.reload, list(self.companions.values()))

    def _admin(self, opened: OpenedFront, options: AssemblyOptions) -> HttpListener:
        from qrlora_deploy.serving.admin import Admin, make_admin_app
        from qrlora_deploy.serving.audit import AuditLog

        if opened.keys is None or options.audit_log is None or options.admin_port is None:
            raise InputError(f"{argument('admin_port')} needs {argument('keys')} and {argument('audit_log')}")
        folders = {model.served.name: folder for model in opened.models if (folder := model.customer_folder())}
        if not folders:
            raise InputError(
                f"{argument('admin_port')} has nothing to change: no model has a folder of customers, and those of an "
                f"object store are changed there; give a folder by {argument('customers')}"
            )
        app = make_admin_app(Admin(folders, opened.keys, AuditLog(options.audit_log), self.reload), opened.front.life)
        return HttpListener(app, options.admin_host, options.admin_port, options.server.tls, options.server.limits)

    def reload(self) -> None:
        """Read keys, folders and packed files again.

        Raises:
            InputError: a packed file cannot be used; what was loaded before stays.
        """
        if self._opened is not None:
            self._opened.reload()

    def run(self, started: Callable[[], None]) -> None:
        """Serve until a signal ends it; as `Server.run`."""
        try:
            self.server.run(started)
        finally:
            self.close()

    def close(self) -> None:
        """Give everything back. Twice is no error."""
        if hasattr(self, "server"):
            self.server.http.close()
        if self._opened is not None:
            self._opened.close()


def _grpc(front: Front, options: ServerOptions, port: int) -> Companion:
    # Before it is imported: it would write a line of its own for each client that it cannot understand.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from qrlora_deploy.serving.grpc.listening import GrpcLimits
    from qrlora_deploy.serving.grpc.server import GrpcServer
    from qrlora_deploy.serving.grpc.service import InferenceService

    service = InferenceService(front.models, front.life, front.keys, front.metrics)
    limits = GrpcLimits(max_message_bytes=options.limits.max_body_bytes)
    return GrpcServer(service, options.host, port, options.tls, limits)
