"""Where spans are sent to: OpenTelemetry's own SDK, set up by its standard environment variables."""

import logging
import os
import sys
import threading
from collections.abc import Iterable, Mapping

from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

from qrlora_deploy.errors import InputError, library_errors
from qrlora_deploy.serving.tracing.complaints import tell_complaints
from qrlora_deploy.serving.tracing.spans import Tracing
from qrlora_deploy.version import __version__

PROTOCOL = "http/protobuf"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER = "OTEL_TRACES_EXPORTER"

CLOSE_S = 5.0
"""For the last spans to be sent, at the end."""

logger = logging.getLogger(__name__)


def open_tracing(customers: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> Tracing:
    """Spans that are sent in the background.

    Args:
        customers: that are named in spans.
        environ: for `OTEL_TRACES_EXPORTER` and the protocol; the SDK reads its own variables from the process.

    Raises:
        InputError: a variable asks for what there is not.
    """
    exporter = make_exporter(environ)
    tell_complaints()
    with library_errors("OpenTelemetry cannot be set up by its OTEL_ variables", InputError):
        provider = TracerProvider(resource=make_resource(), shutdown_on_exit=False)
        if exporter is not None:
            provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, customers, lambda: _shut_down(provider))


def make_resource() -> Resource:
    """What the spans are of; the name and the version are ours where no variable says another one."""
    found = Resource.create()
    if str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        found = found.merge(Resource({SERVICE_NAME: "qrlora-deploy"}))
    return Resource({SERVICE_VERSION: __version__}).merge(found)


def make_exporter(environ: Mapping[str, str]) -> SpanExporter | None:
    """What `OTEL_TRACES_EXPORTER` asks for; None: nothing is sent.

    Raises:
        InputError: it is neither otlp, console nor none, or the protocol is not http/protobuf.
    """
    name = environ.get(EXPORTER, "").strip() or "otlp"
    if name == "none":
        return None
    if name == "console":
        return ConsoleSpanExporter(out=sys.stderr)
    if name != "otlp":
        raise InputError(f"{EXPORTER}={name!r:.40} is not offered; set otlp, console or none")
    for variable in PROTOCOLS:
        protocol = environ.get(variable, "").strip() or PROTOCOL
        if protocol != PROTOCOL:
            raise InputError(f"{variable}={protocol!r:.40} is not offered; set {PROTOCOL}")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    with library_errors("the OTLP exporter cannot be set up by its OTEL_EXPORTER_OTLP_ variables", InputError):
        return OTLPSpanExporter()


def _shut_down(provider: TracerProvider) -> None:
    """Send what is left, but wait for no collector that does not answer."""
    thread = threading.Thread(target=provider.shutdown, name="spans-sender", daemon=True)
    thread.start()
    thread.join(CLOSE_S)
    if thread.is_alive():
        logger.warning("the last spans could not be sent within %g s", CLOSE_S)
