"""Spans that leave the process: what the variables of OpenTelemetry say, and `serve --otel` beside a collector."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace.export import ConsoleSpanExporter

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.serving.tracing import sending
from qrlora_deploy.serving.tracing.complaints import Complaints
from qrlora_deploy.serving.tracing.sending import make_exporter, make_resource, open_tracing
from qrlora_deploy.version import __version__
from tests.cli.running import environment, run
from tests.serving.process import Served
from tests.serving.tracing.collector import Collector
from tests.serving.tracing.looking import STAGES, TRACE, TRACEPARENT


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


@pytest.mark.parametrize("log", [(), ("--log-json",)])
@pytest.mark.parametrize("collector", ["nobody", "silent"])
def test_without_a_collector_there_is_one_line_a_minute(
    served: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: tuple[str, ...],
    collector: str,
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = 9 if collector == "nobody" else silent.getsockname()[1]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        # Less than what is asked makes: spans are dropped, and nobody waits for room.
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
        with (
            Served(*served, "--otel", *log, cwd=tmp_path) as server,
            httpx.Client(base_url=server.url, timeout=20) as client,
        ):
            end = time.monotonic() + 4
            while time.monotonic() < end:
                assert client.post("/v1/classify", json={"texts": ["a text"]}).status_code == 200
            said = [line for line in server.errors if '"request"' not in line]
            assert len(said) == 1 and "spans may be lost: " in said[0], said
            assert server.end() == 0


def test_complaints_are_counted_while_they_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    complaints = Complaints(lambda: now[0])
    record = logging.LogRecord("opentelemetry.x", logging.ERROR, "", 1, "refused %s", ("here",), None)
    for second in range(150):
        now[0] = 100.0 + second
        complaints.handle(record)
    assert caplog.messages == [
        "spans may be lost: refused here",
        "spans may be lost: refused here (59 more such lines were left out)",
        "spans may be lost: refused here (59 more such lines were left out)",
    ]


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
