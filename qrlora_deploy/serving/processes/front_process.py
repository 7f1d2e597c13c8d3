"""The process of a front: HTTP, gRPC, keys and tokenising; it asks the engines for the rest."""

from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.serving.access import Keys
from qrlora_deploy.serving.assembly import grpc_companion, tracing_of
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.opening import ModelPlaces
from qrlora_deploy.serving.processes.control import Control, SharedMetrics, SharedWindow
from qrlora_deploy.serving.processes.engine_link import EngineLink
from qrlora_deploy.serving.processes.options import ChildOptions
from qrlora_deploy.serving.processes.remote_engine import RemoteEngine
from qrlora_deploy.serving.processes.remote_writer import RemoteWriter
from qrlora_deploy.serving.served import Models, ServedModel
from qrlora_deploy.serving.server import Server
from qrlora_deploy.serving.tokenizing import RowTokenizer


def run_front(options: ChildOptions, control: Control) -> None:
    """Answer clients until the supervisor ends it.

    Raises:
        QrloraError: something cannot be opened, or not everything was answered in time.
    """
    made_of = options.server
    control.opening("what its requests are read by")
    keys = None if made_of.keys is None else Keys.open(made_of.keys, kept=made_of.kept_keys)
    links = [EngineLink(options.socket_of(number)) for number in range(len(options.devices))]
    models = Models([_served(places, links) for places in made_of.places])
    tracing = tracing_of(made_of.counted) if made_of.otel else None
    metrics, window = SharedMetrics(control, made_of.counted), SharedWindow(control)
    front = Front(models, keys=keys, metrics=metrics, window=window, tracing=tracing)
    companions = []
    if made_of.grpc_port is not None:
        companions.append(grpc_companion(front, made_of.server, made_of.grpc_port))
    server = Server(
        front,
        made_of.server,
        (lambda: None) if keys is None else (lambda: _read_again(keys)),
        companions,
        before=[control, *links],
        has_signals=False,
    )
    control.stop, control.reload = server.stop, server.begin_reload
    control.state = lambda: front.counts.totals().as_record()
    # It waits for the engines, which have bounds of their own.
    control.opening("")
    try:
        server.run(control.ready)
    finally:
        if tracing is not None:
            tracing.close()


def _read_again(keys: Keys) -> None:
    keys.reload()


def _served(places: ModelPlaces, links: list[EngineLink]) -> ServedModel:
    bundle = open_bundle(places.bundle)
    if bundle.manifest.deciding_task.writes_text:
        writer = RemoteWriter(links, places.name, bundle)
        return ServedModel(places.name, bundle, writer, RowTokenizer(bundle), writer=writer)
    engine = RemoteEngine(links, places.name, bundle.manifest)
    return ServedModel(places.name, bundle, engine, RowTokenizer(bundle))
