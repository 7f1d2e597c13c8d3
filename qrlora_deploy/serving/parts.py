"""What a front is given beside its models."""

from collections.abc import Sequence
from typing import Protocol

from qrlora_deploy.serving.access import Access


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
