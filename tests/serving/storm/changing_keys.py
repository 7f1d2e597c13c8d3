"""A file of keys that changes underneath a server, and since when each key may, must and must not be answered."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from qrlora_deploy.serving.keys_file import empty_keys, with_key, without_key, write_keys

BOUND_S = 5.0
"""From a change of the file on, after which every process goes by it. docs/serving-keys.md says so."""


@dataclass
class Ticket:
    """A key.

    Attributes:
        key: itself.
        key_id: its id.
        customers: that it may ask for.
        since: when the server must know it, by the monotonic clock.
        until: when it was revoked or expired; None: it holds.
    """

    key: str
    key_id: str
    customers: Sequence[str]
    since: float
    until: float | None = None

    def judge(self, code: int, begin: float, end: float) -> str:
        """What is wrong with a status that came between two times; usually "". 200 stands for an answer."""
        if code == 200 and self.until is not None and begin > self.until + BOUND_S:
            return f"a key was answered {begin - self.until:.1f} s after its end"
        if code == 401 and begin > self.since + BOUND_S and (self.until is None or end < self.until):
            return f"a key that holds was refused {begin - self.since:.1f} s after it was added"
        return ""


@dataclass
class ChangingKeys:
    """The file, and whoever changes it; one thread changes, any may look.

    Attributes:
        path: of the file.
        tickets: every key that there ever was, but for the admin's.
        admin: key of the admin API.
        latest_s: the longest time after its end at which a key was still answered.
    """

    path: Path
    tickets: list[Ticket] = field(default_factory=list)
    latest_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._file, _, self.admin = with_key(empty_keys(), [], [], admin=True)

    def write(self) -> None:
        """What is known, in one step."""
        write_keys(self._file, self.path)

    def add(self, customers: Sequence[str], expires_in_s: float | None = None) -> None:
        """A further key, which may expire soon."""
        when = None if expires_in_s is None else datetime.now(UTC) + timedelta(seconds=expires_in_s)
        self._file, stored, key = with_key(
            self._file, list(customers), [], expires=None if when is None else when.isoformat()
        )
        self.write()
        now = time.monotonic()
        until = None if expires_in_s is None else now + expires_in_s
        with self.lock:
            self.tickets.append(Ticket(key, stored.id, customers, now, until))

    def revoke(self, ticket: Ticket) -> None:
        """End a key."""
        self._file = without_key(self._file, ticket.key_id, self.path)
        # From here on it may be refused; only once the file is written it must be.
        with self.lock:
            ticket.until = time.monotonic()
        self.write()
        with self.lock:
            ticket.until = time.monotonic()

    def damage(self) -> None:
        """Leave half a file; the keys before go on."""
        self.path.write_bytes(self.path.read_bytes()[:-40])

    def holding(self) -> list[Ticket]:
        """Keys that were not ended."""
        with self.lock:
            return [it for it in self.tickets if it.until is None]

    def answered(self, ticket: Ticket, begin: float) -> None:
        """Remember how late an ended key was answered."""
        if ticket.until is not None:
            self.latest_s = max(self.latest_s, begin - ticket.until)
