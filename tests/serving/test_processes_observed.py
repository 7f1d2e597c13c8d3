"""A server of several processes, seen from outside: the last minutes and the spans are those of all of them."""

from pathlib import Path

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from tests.serving.process import Served
from tests.serving.test_processes import until
from tests.serving.tracing.collector import Collector
from tests.serving.tracing.looking import STAGES, TRACE, TRACEPARENT
from tests.tiny import SENTENCES

ASK = {"texts": list(SENTENCES), "customer": "acme"}


def test_the_page_and_the_spans_are_of_all_processes(
    switchable: Path, customers: dict[str, Coefficients], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "customers").mkdir()
    write_coefficients(customers["acme"], tmp_path / "customers" / "acme.safetensors")
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    bundle = ("--model", f"tiny={switchable}", "--customers", "customers", "--threads", 1)
    try:
        with Served(*bundle, "--processes", 2, "--otel", cwd=tmp_path) as server:
            # A new connection for each, so that both fronts have some.
            for _ in range(30):
                assert httpx.post(f"{server.url}/v1/classify", json=ASK).status_code == 200
            for _ in range(7):
                assert httpx.post(f"{server.url}/v1/classify", json={"texts": []}).status_code == 400
            httpx.post(f"{server.url}/v1/classify", json=ASK, headers={"traceparent": TRACEPARENT})

            def all_are_there() -> bool:
                numbers = httpx.get(f"{server.url}/live.json").json()
                return (
                    numbers["refused"] == {"malformed_input": 7}
                    and round(numbers["now"]["requests_s"] * numbers["seconds"]) == 31
                )

            until(all_are_there)
            numbers = httpx.get(f"{server.url}/live.json").json()
            assert round(numbers["models"][0]["rows_s"] * numbers["seconds"]) == 31 * len(SENTENCES)
            assert numbers["now"]["p99_ms"] >= numbers["now"]["queue_p50_ms"] > 0 and numbers["state"] == "ready"
            assert httpx.get(server.url).status_code == 200
            assert server.end() == 0
        spans = [span for span in collector.spans() if span.trace_id.hex() == TRACE]
        assert [span.name for span in spans] == [*STAGES, "POST /v1/classify"]
        assert len([span for span in collector.spans() if span.name == "POST /v1/classify"]) == 38
        run = spans[STAGES.index("run")]
        # The engine's times, of another process, lie within the request.
        request = spans[-1]
        slack_ns = 5_000_000
        assert request.start_time_unix_nano - slack_ns <= run.start_time_unix_nano < run.end_time_unix_nano
        assert run.end_time_unix_nano <= request.end_time_unix_nano + slack_ns
    finally:
        collector.close()
