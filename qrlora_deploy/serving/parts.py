"""What a front is given beside its models."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qrlora_deploy.serving.access import Access
from qrlora_deploy.serving.engine.rows import Run


class Keys(Protocol):
    """Who may ask."""

    def access(self, key: str | None) -> Access:
        """What a key may do.

        Raises:
            UnauthenticatedError: it is none that is known, or None.
        """


class Metrics(Protocol):
    """Counts requests."""

    async def scrape(self) -> bytes:
        """What Prometheus reads."""

    def observe(self, route: str, code: int, seconds: float, rows: int, customers: Sequence[str | None] = ()) -> None:
        """Count a request."""


class LiveNumbers(Protocol):
    """What the page for people shows; `live.window.Window` is one."""

    async def follow(self) -> None:
        """Look at the totals again and again, until it is cancelled."""

    async def ask(self) -> dict[str, Any]:
        """As `Window.numbers`."""


class Spans(Protocol):
    """Is told of the stages of a request; `tracing.spans.RequestSpans` is one."""

    @property
    def trace_id(self) -> str:
        """For logs."""

    def asks(self, model: str, customers: Sequence[str | None]) -> None:
        """What is asked."""

    def has_tokens(self, count: int) -> None:
        """Of all rows together."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def ran(self, runs: Sequence[Run]) -> None:
        """The rows were answered in these runs."""

    def end(self, reason: str, failed: bool, attributes: Mapping[str, str | int]) -> None:
        """The request has ended."""


class Tracing(Protocol):
    """Begins the spans of requests."""

    def begin(self, name: str, carrier: Mapping[str, str], attributes: Mapping[str, str | int]) -> Spans | None:
        """Of a request with these headers; None: nobody wants them."""
