"""A whole server in one process, put together: models, keys, quotas, fronts and the admin API."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.formats.customer_files import check_customer_id
from qrlora_deploy.runtime.customers.objects.store import ObjectStoreStats
from qrlora_deploy.serving.access import Keys
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.http.listener import HttpListener
from qrlora_deploy.serving.life import Hanging, Life
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.opening import ModelPlaces, OpenModel, RunOptions
from qrlora_deploy.serving.opening_watch import Begin, unwatched
from qrlora_deploy.serving.served import Models
from qrlora_deploy.serving.server import Companion, Server, ServerOptions

if TYPE_CHECKING:
    from qrlora_deploy.serving.tracing.spans import Tracing


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
        counted: customers whose rows metrics tell by name, and whom spans name.
        processes: for HTTP, gRPC, keys and tokenising; 0: all in one process.
        devices: with `processes`, one for each process of an engine; none: `run.provider`.
        otel: send spans, as the `OTEL_` variables of the process say.
        hang_s: how long a run may take, and with `processes` one of them may say nothing; then it is killed and started
            again. In one process health says from then on that it is not live. 0: as long as it likes.
        open_s: how long one thing may take to open, such as a model or a listing of customers, before the process that
            opens it is ended. 0: as long as it likes.
        kept_keys: with `processes`, where engines keep a copy of the keys that were read last: a process that is
            started while the file is missing or damaged begins with these.

    Raises:
        InputError: the admin API is asked for without keys or audit log, or an audit log without it; several devices
            without `processes`; two fronts on one port; or one of `counted` is no customer's id.
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
    processes: int = 0
    devices: Sequence[str] = ()
    otel: bool = False
    hang_s: float = 60.0
    open_s: float = 600.0
    kept_keys: Path | None = None

    def __post_init__(self) -> None:
        for name in self.counted:
            check_customer_id(name)
        for name, seconds in (("hang_s", self.hang_s), ("open_s", self.open_s)):
            if 0 < seconds < 1:
                raise InputError(f"{argument(name, seconds)} is too short to tell anything; give 1 or more, or 0")
        if self.devices and not self.processes:
            raise InputError(f"several devices need processes of their own: give {argument('processes', 2)}")
        if self.admin_port is not None and (self.keys is None or self.audit_log is None):
            raise InputError(f"{argument('admin_port')} needs {argument('keys')} and {argument('audit_log')}")
        if self.admin_port is None and self.audit_log is not None:
            raise InputError(f"{argument('audit_log')} is of the admin API; give {argument('admin_port')}, too")
        if self.grpc_port and self.grpc_port == self.server.port:
            raise InputError(f"{argument('grpc_port', self.grpc_port)} is the port of HTTP; give another one")


class Assembly:
    """Everything that a server needs, open; nothing answers yet.

    Args:
        options: what it is made of.
        begin: told what is opened.

    Attributes:
        parts: models, keys and quotas.
        server: to be run.
        companions: by what they are called: "gRPC" and "admin API".

    Raises:
        QrloraError: something cannot be used; what was opened before is closed.
    """

    def __init__(self, options: AssemblyOptions, begin: Begin = unwatched) -> None:
        self._tracing: Tracing | None = None
        self.companions: dict[str, Companion] = {}
        self.parts = EngineParts(options, begin)
        try:
            self._open(options)
        except BaseException:
            self.close()
            raise

    @property
    def models(self) -> list[OpenModel]:
        """Open ones."""
        return self.parts.models

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.server.http.url

    @property
    def ports(self) -> dict[str, int]:
        """Of the companions, by what they are called."""
        return {name: companion.port for name, companion in self.companions.items()}

    def _open(self, options: AssemblyOptions) -> None:
        if options.otel:
            self._tracing = tracing_of(options.counted)
        parts = self.parts
        models = Models([model.served for model in parts.models])
        metrics = Metrics(list(models), options.counted, parts.stores())
        life = Life(Hanging(models.stats, options.hang_s).found)
        front = Front(models, life, parts.keys, metrics=metrics, tracing=self._tracing)
        if options.grpc_port is not None:
            self.companions["gRPC"] = grpc_companion(front, options.server, options.grpc_port)
        if options.admin_port is not None:
            self.companions["admin API"] = parts.admin(front.life, self.reload)
        self.server = Server(front, options.server, self.reload, list(self.companions.values()))

    def reload(self) -> None:
        """As `EngineParts.reload`."""
        self.parts.reload()

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
        self.parts.close()
        if self._tracing is not None:
            self._tracing.close()


class EngineParts:
    """What an engine's process has, and a server in one process beside its fronts: models, keys and quotas.

    Args:
        options: of the server.
        begin: told what is opened.

    Attributes:
        models: open.
        keys: None: everybody is answered.

    Raises:
        QrloraError: something cannot be used; what was opened before is closed.
    """

    def __init__(self, options: AssemblyOptions, begin: Begin = unwatched) -> None:
        self._options, self._begin = options, begin
        self.models: list[OpenModel] = []
        self.keys: Keys | None = None
        self._quotas: list[Quotas] = []
        try:
            self._open(options)
        except BaseException:
            self.close()
            raise

    def _open(self, options: AssemblyOptions) -> None:
        # Files that are quick to read come first: who misspells one need not wait for a model.
        if options.keys is not None:
            self._begin(f"{options.keys}, the file of keys,")
            self.keys = Keys.open(options.keys, self._change_quotas, options.kept_keys, keeps=True)
        for places in options.places:
            self._quotas.append(Quotas())
            self.models.append(OpenModel(places, options.run, self._quotas[-1], self._begin))
        if self.keys is not None:
            self._change_quotas(self.keys)

    def stores(self) -> dict[str, Callable[[], ObjectStoreStats]]:
        """By the model's name, what says how the object store of its customers is doing."""
        return {model.served.name: ask for model in self.models if (ask := model.object_stats) is not None}

    def _change_quotas(self, keys: Keys) -> None:
        for quotas in self._quotas:
            quotas.change(*keys.quotas())

    def admin(
        self, life: Life, reload: Callable[[], None], erased: Callable[[str, str], None] = lambda model, customer: None
    ) -> HttpListener:
        """The admin API of these models.

        Args:
            life: of the process.
            reload: reads everything again.
            erased: called with a model and a customer that was taken from its memory.

        Raises:
            InputError: no model has customers that can be changed.
        """
        from qrlora_deploy.serving.admin import Admin, make_admin_app
        from qrlora_deploy.serving.audit import AuditLog

        options = self._options
        if self.keys is None or options.audit_log is None or options.admin_port is None:
            raise InputError(f"{argument('admin_port')} needs {argument('keys')} and {argument('audit_log')}")
        folders = {
            model.served.name: folder
            for model in self.models
            if (folder := model.customer_folder(partial(erased, model.served.name)))
        }
        if not folders:
            raise InputError(
                f"{argument('admin_port')} has nothing to change: no model has a folder of customers, and those of an "
                f"object store are changed there; give a folder by {argument('customers')}"
            )
        app = make_admin_app(Admin(folders, self.keys, AuditLog(options.audit_log), reload), life)
        server = options.server
        return HttpListener(app, options.admin_host, options.admin_port, server.tls, server.limits, server.is_shared)

    def reload(self) -> None:
        """Read keys, folders and packed files again.

        Raises:
            InputError: a packed file cannot be used; what was loaded before stays.
        """
        if self.keys is not None:
            self.keys.reload()
        for model in self.models:
            model.reload()

    def close(self) -> None:
        """Give everything back. Twice is no error."""
        for model in self.models:
            model.close()
        self.models = []


def tracing_of(customers: Sequence[str]) -> "Tracing":
    """What sends spans, as the `OTEL_` variables of the process say; customers of the list are named."""
    from qrlora_deploy.serving.tracing.sending import open_tracing

    return open_tracing(customers)


def grpc_companion(front: Front, options: ServerOptions, port: int) -> Companion:
    """A gRPC server for what a front has."""
    # Before it is imported: it would write a line of its own for each client that it cannot understand.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from qrlora_deploy.serving.grpc.listening import GrpcLimits
    from qrlora_deploy.serving.grpc.server import GrpcServer
    from qrlora_deploy.serving.grpc.service import InferenceService

    service = InferenceService(
        front.models, front.life, front.keys, front.metrics, counts=front.counts, tracing=front.tracing
    )
    limits = GrpcLimits(max_message_bytes=options.limits.max_body_bytes)
    return GrpcServer(service, options.host, port, options.tls, limits, options.is_shared)
