"""Spans that leave the process: what the variables of OpenTelemetry say, and `serve --otel` beside a collector."""

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import ConsoleSpanExporter

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.serving.tracing import sending
from qrlora_deploy.serving.tracing.sending import make_exporter, make_resource, open_tracing
from qrlora_deploy.version import __version__
from tests.cli.running import environment, run
from tests.serving.process import Served
from tests.serving.tracing.looking import STAGES, TRACE, TRACEPARENT


class Collector:
    """Takes spans as an OpenTelemetry collector does.

    Attributes:
        requests: path, headers and message of each.
        url: of it.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any, Any]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.requests.append((self.path, self.headers, ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def spans(self) -> list[Any]:
        return [
            span
            for _, _, message in self.requests
            for resource in message.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def served(switchable: Path, customers: dict[str, Coefficients], tmp_path: Path) -> tuple[object, ...]:
    (tmp_path / "customers").mkdir()
    write_coefficients(customers["acme"], tmp_path / "customers" / "acme.safetensors")
    return ("--model", f"tiny={switchable}", "--customers", "customers")


def test_serve_sends_what_it_did_before_it_ends(
    collector: Collector, served: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=search")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    # Longer than the test: the end sends them.
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    with Served(*served, "--otel", "--count-customer", "acme", cwd=tmp_path) as server:
        ask = {"texts": ["a text"], "customer": "acme"}
        reply = httpx.post(f"{server.url}/v1/classify", json=ask, headers={"traceparent": TRACEPARENT})
        assert reply.status_code == 200 and collector.requests == []
        assert server.end() == 0
    path, headers, message = collector.requests[0]
    assert path == "/v1/traces" and headers["x-team"] == "search"
    resource = {item.key: item.value.string_value for item in message.resource_spans[0].resource.attributes}
    assert resource["service.name"] == "qrlora-deploy" and resource["service.version"] == __version__
    assert resource["deployment.environment.name"] == "test"
    spans = collector.spans()
    assert [span.name for span in spans] == [*STAGES, "POST /v1/classify"]
    assert {span.trace_id.hex() for span in spans} == {TRACE}


def test_without_the_option_nothing_is_sent(
    collector: Collector, served: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with Served(*served, cwd=tmp_path) as server:
        assert httpx.post(f"{server.url}/v1/classify", json={"texts": ["a text"]}).status_code == 200
    assert collector.requests == []


def test_a_server_without_spans_imports_nothing_of_opentelemetry() -> None:
    code = (
        "import sys, qrlora_deploy.serving.assembly, qrlora_deploy.serving.grpc.server\n"
        "print(sorted(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout == "[]\n"


def test_a_collector_that_is_not_there_holds_nothing_up(
    served: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "CLOSE_S", 0.2)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracing = open_tracing()
    spans = tracing.begin("request", {}, {})
    assert spans is not None
    spans.end("", False, {})
    start = time.monotonic()
    tracing.close()
    assert time.monotonic() - start < 20
    with Served(*served, "--otel", "--log-json", cwd=tmp_path) as server:
        for _ in range(3):
            assert httpx.post(f"{server.url}/v1/classify", json={"texts": ["a text"]}).status_code == 200
        assert server.end() == 0
    # The SDK's own complaints are lines of JSON too.
    assert all(line.startswith("{") for line in server.errors)


def test_what_the_variables_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_exporter({"OTEL_TRACES_EXPORTER": "none"}) is None
    assert isinstance(make_exporter({"OTEL_TRACES_EXPORTER": "console"}), ConsoleSpanExporter)
    assert type(make_exporter({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"})).__name__ == "OTLPSpanExporter"
    with pytest.raises(InputError, match=r"^OTEL_TRACES_EXPORTER='zipkin' is not offered; set otlp, console or none$"):
        make_exporter({"OTEL_TRACES_EXPORTER": "zipkin"})
    for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"):
        with pytest.raises(InputError, match=rf"^{name}='grpc' is not offered; set http/protobuf$"):
            make_exporter({name: "grpc"})
    monkeypatch.setenv("OTEL_SERVICE_NAME", "intents")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.version=7,team=search")
    attributes = make_resource().attributes
    assert (attributes["service.name"], attributes["service.version"], attributes["team"]) == ("intents", "7", "search")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracing().begin("request", {}, {}) is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert open_tracing().begin("request", {}, {}) is None


def test_a_variable_that_asks_for_what_there_is_not_ends_in_one_line(
    served: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    ran = run("serve", *served, "--otel", "--check", cwd=tmp_path)
    assert ran.code == 2 and ran.err.count("\n") == 1 and "is not offered; set http/protobuf" in ran.err
