"""What is looked for in spans."""

from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"

STAGES = ["admit", "tokenise", "wait", "run", "answer"]

NO_TRACEPARENTS = [
    "",
    "nonsense",
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"ff-{TRACE}-{PARENT}-01",
    f"00-{TRACE.upper()}x-{PARENT}-01",
    "00-" + "a" * 5000,
]


def request_and_stages(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The span of the one request, and those of its stages in the order of their begin."""
    spans = exporter.get_finished_spans()
    (request,) = [span for span in spans if span.kind is SpanKind.SERVER]
    stages = sorted((span for span in spans if span is not request), key=lambda span: span.start_time or 0)
    assert all(span.parent == request.context and span.context.trace_id == request.context.trace_id for span in stages)
    exporter.clear()
    return request, stages


def check_order(request: ReadableSpan, stages: Sequence[ReadableSpan]) -> None:
    """Each stage begins where the one before it ends, within the request."""
    times = [time for span in stages for time in (span.start_time, span.end_time)]
    assert times == sorted(times, key=lambda time: time or 0)
    assert all(one.end_time == other.start_time for one, other in zip(stages, stages[1:], strict=False))
    # The request's own times are of another clock, which is set anew for each request.
    slack = 5_000_000
    assert (request.start_time or 0) - slack <= (times[0] or 0) and (times[-1] or 0) <= (request.end_time or 0) + slack
