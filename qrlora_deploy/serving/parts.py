"""What a front is given beside its models."""

from typing import Protocol

from qrlora_deploy.serving.answering import Allows


class Keys(Protocol):
    """Who may ask."""

    def access(self, key: str | None) -> Allows:
        """What a key may do.

        Raises:
            UnauthenticatedError: it is none that is known, or None.
        """


class Metrics(Protocol):
    """Counts requests."""

    def text(self) -> bytes:
        """What Prometheus reads."""

    def observe(self, route: str, code: int, seconds: float, rows: int) -> None:
        """Count a request."""
