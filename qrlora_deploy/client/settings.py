"""What both clients are made of."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from qrlora_deploy.client.retrying import Retries, Tries
from qrlora_deploy.errors import InputError

HEALTH_S = 5.0
"""A question for readiness waits so long at most."""


@dataclass(frozen=True)
class Settings:
    """Where the server is and how it is asked.

    Attributes:
        url: of the server, without a slash at its end.
        key: sent with each request; shown nowhere.
        deadline_s: seconds for a request with all its tries; None: no bound.
        retries: how often a request is tried again.
        headers: of each request.

    Raises:
        InputError: the URL or the key is none.
    """

    url: str
    key: str | None = field(repr=False)
    deadline_s: float | None
    retries: Retries
    headers: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InputError(f"{self.url!r:.80} is no address of a server; write it as https://host:8080")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and self.key.strip()):
            raise InputError("the key holds characters that no key has; give it as `keys add` showed it")
        object.__setattr__(self, "url", self.url.rstrip("/"))
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key.strip()}"}
        object.__setattr__(self, "headers", headers)

    @property
    def health_s(self) -> float:
        """Seconds that a question for readiness may take."""
        return min(HEALTH_S, self.deadline_s or HEALTH_S)

    def tries(self, deadline_s: float | None) -> Tries:
        """The tries of a request, with a deadline of its own where one is given."""
        return Tries(self.retries, self.deadline_s if deadline_s is None else deadline_s)
