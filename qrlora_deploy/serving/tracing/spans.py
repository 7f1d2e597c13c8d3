"""A span for each request that asks a model, and in it one for each stage: admit, tokenise, wait, run, answer."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider, format_trace_id, set_span_in_context

from qrlora_deploy.serving.engine.rows import Run
from qrlora_deploy.version import __version__

Values = Mapping[str, str | int]

MODEL, ROWS, TOKENS = "qrlora.model", "qrlora.rows", "qrlora.tokens"
CUSTOMERS, CUSTOMER = "qrlora.customers", "qrlora.customer"
REASON, ERROR = "qrlora.refused", "error.type"
BATCHES, BATCH_ROWS, BATCH_TOKENS = "qrlora.batches", "qrlora.batch.rows", "qrlora.batch.padded_tokens"


class Tracing:
    """Begins spans. Safe for many threads.

    Args:
        provider: whose tracer is used.
        customers: that are named in spans. Of others a span says how many there were.
        close: called at the end.
    """

    def __init__(
        self, provider: TracerProvider, customers: Iterable[str] = (), close: Callable[[], None] = lambda: None
    ) -> None:
        self._tracer = provider.get_tracer("qrlora_deploy.serving", __version__)
        self._customers = frozenset(customers)
        self.close = close

    def begin(self, name: str, carrier: Mapping[str, str], attributes: Values) -> "RequestSpans | None":
        """Begin the span of a request.

        Args:
            name: of the span.
            carrier: headers or metadata; a traceparent in it makes the span part of the client's trace, and one that
                is none is ignored. Which headers are read is for `OTEL_PROPAGATORS`.
            attributes: of the span.

        Returns:
            None: the trace is not sampled, and nothing of it costs anything.
        """
        parent = propagate.extract(carrier, Context())
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, dict(attributes))
        return RequestSpans(self._child, span, self._customers) if span.is_recording() else None

    def _child(self, name: str, parent: Context, start_ns: int) -> Span:
        return self._tracer.start_span(name, parent, start_time=start_ns)


class RequestSpans:
    """The span of a request and those of its stages, which follow one another.

    Args:
        child: begins the span of a stage.
        span: of the request.
        named: customers that may be named.
    """

    def __init__(self, child: Callable[[str, Context, int], Span], span: Span, named: frozenset[str]) -> None:
        self._child, self._span, self._named = child, span, named
        self._context = set_span_in_context(span, Context())
        self._stage: Span | None = None
        # The engine tells times of the monotonic clock.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    @property
    def trace_id(self) -> str:
        """In hexadecimal, for logs."""
        return format_trace_id(self._span.get_span_context().trace_id)

    def asks(self, model: str, customers: Sequence[str | None]) -> None:
        """What is asked: a model, and a customer for each row."""
        self._span.set_attributes({MODEL: model, ROWS: len(customers), CUSTOMERS: len(set(customers))})
        if self._named and (named := sorted(self._named.intersection(filter(None, customers)))):
            self._span.set_attribute(CUSTOMER, named)

    def has_tokens(self, count: int) -> None:
        """How many tokens all rows have together."""
        self._span.set_attribute(TOKENS, count)

    def stage(self, name: str) -> None:
        """Begin a stage; the one before it ends."""
        self._move_on(name, time.monotonic_ns())

    def ran(self, runs: Sequence[Run]) -> None:
        """The rows were answered in these runs: the stage "wait" ends where the first one began, "run" where the last
        one ended, and "answer" begins there. Nothing is known of a run where there are none."""
        if not runs:
            self.stage("answer")
            return
        start_s, end_s = min(run.start_s for run in runs), max(run.end_s for run in runs)
        self._move_on("run", int(start_s * 1e9))
        if self._stage is not None:
            rows, tokens = sum(run.rows for run in runs), sum(run.padded_tokens for run in runs)
            self._stage.set_attributes({BATCHES: len(runs), BATCH_ROWS: rows, BATCH_TOKENS: tokens})
        self._move_on("answer", int(end_s * 1e9))

    def end(self, reason: str, failed: bool, attributes: Values) -> None:
        """End the stage that is under way, and the request.

        Args:
            reason: why it was not answered; empty: it was.
            failed: it is no mistake of the client.
            attributes: of the request's span.
        """
        self._span.set_attributes(dict(attributes))
        for span in (self._stage, self._span):
            if span is None:
                continue
            if reason:
                span.set_attribute(REASON, reason)
            if failed:
                # Without a description: an error's line may name a customer.
                span.set_attribute(ERROR, reason)
                span.set_status(Status(StatusCode.ERROR))
            span.end()

    def _move_on(self, name: str, time_ns: int) -> None:
        if self._stage is not None:
            self._stage.end(time_ns + self._epoch_ns)
        self._stage = self._child(name, self._context, time_ns + self._epoch_ns)
