"""Customers in a folder: read when they are asked for, and live soon after their file changes."""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qrlora_deploy.coefficients import Coefficients
from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.runtime.customer_files import (
    SUFFIX,
    check_customer_id,
    customer_ids,
    customer_of,
    read_customer,
)
from qrlora_deploy.runtime.switchable import SwitchableSession
from qrlora_deploy.runtime.table import TableFullError
from qrlora_deploy.runtime.watching import FolderWatcher

__all__ = ["CustomerStore", "StoreEvent", "check_customer_id"]

LOCKS = 64
"""Customers share this many locks: enough that two that are read at once rarely wait for each other."""

SETTLE_S = 3.0
"""A file that was read when it was younger is looked at again. Polling compares whole seconds, so a
second change within one would not be seen."""

Signature = tuple[int, ...]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreEvent:
    """What happened to a customer.

    Attributes:
        kind: "loaded": a version went live; "refused": its file is no customer of this bundle, and
            what was loaded before goes on; "removed": its file was deleted; "failed": something
            else went wrong and is tried again.
        customer: the id; empty where it is about the folder.
        message: one line.
        digest: `Coefficients.digest` of what was loaded; else empty.
    """

    kind: Literal["loaded", "refused", "removed", "failed"]
    customer: str
    message: str
    digest: str = ""


@dataclass(frozen=True)
class _Again:
    """A file to look at again: when its signature changes, or at any rate where that is None."""

    signature: Signature | None
    until: float = float("inf")
    message: str = ""


def _version_of(coefficients: Coefficients) -> bytes:
    """What a customer does and for which bundle: two files with the same are not told apart."""
    it = coefficients
    record = [it.digest, it.labels, it.basis_digest, it.base_digest, it.task]
    return hashlib.sha256(json.dumps(record).encode()).digest()


class CustomerStore:
    """Files `folder/<id>.safetensors` behind a session. Safe for many threads.

    The session's `fetch` becomes this store's: a customer that is not in the table, or was pushed
    out of it, is read when it is asked for. Between `start` and `close` a thread watches the
    folder: a changed file of a customer in the table goes live, a deleted one is unloaded. A file
    that cannot be served is reported and what was loaded before goes on being served.

    A file may be a link within the folder; that its target was replaced is seen when something
    changes in the folder itself.

    Args:
        session: where the customers go.
        folder: their files.
        report: called with every event, from any thread; without it events are logged.
        poll: compare the files again and again instead of asking the system for changes, which
            network folders do not tell.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(
        self,
        session: SwitchableSession,
        folder: Path,
        report: Callable[[StoreEvent], None] | None = None,
        poll: bool = False,
    ) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        self.session = session
        self.folder = folder.absolute()
        self._report = report
        # A customer is read and published under its lock: what was read before a change can then
        # never be published after it.
        self._locks = tuple(threading.Lock() for _ in range(LOCKS))
        self._read: dict[str, tuple[bytes, Signature | None]] = {}
        self._again: dict[str, _Again] = {}
        self._links: set[str] = set()
        self._watcher = FolderWatcher(self.folder, self._compare, self._follow, self._complain, poll)
        session.fetch = self.fetch

    def __enter__(self) -> "CustomerStore":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def customers(self) -> list[str]:
        """Ids of all files in the folder, sorted; they are not read.

        Raises:
            InputError: the folder cannot be read.
        """
        return sorted(customer_ids(self.folder))

    def start(self) -> None:
        """Begin to watch. What changed since the customers in the table were read goes live too."""
        self._watcher.start()

    def close(self) -> None:
        """Stop to watch; customers are still fetched when they are asked for."""
        self._watcher.close()

    def fetch(self, customer: str) -> None:
        """Bring a customer into the table, unless another request has just done so.

        Raises:
            InputError: the id is none, there is no file, or it is refused.
            QrloraError: the table cannot grow.
        """
        check_customer_id(customer)
        try:
            with self._lock_of(customer):
                event = None if customer in self.session.table else self._bring(customer)
        except QrloraError as error:
            if os.path.lexists(self._path(customer)):
                self._tell(_event_of(customer, error))
            raise
        self._tell(event)

    def _bring(self, customer: str) -> StoreEvent | None:
        """Read a customer and publish it where it does something new. Called under its lock."""
        path = self._path(customer)
        signature = _signature(path)
        try:
            coefficients = read_customer(self.folder, customer)
            version = _version_of(coefficients)
            known = self._read.get(customer)
            event = None
            if known is None or known[0] != version or customer not in self.session.table:
                self.session.load(customer, coefficients)
                event = StoreEvent("loaded", customer, f"{path} is live", coefficients.digest)
        except Exception as error:
            refused = isinstance(error, InputError) and not isinstance(error, TableFullError)
            self._look_again(
                customer, _Again(signature if refused else None, message=_event_of(customer, error).message)
            )
            raise
        self._read[customer] = (version, signature)
        (self._links.add if path.is_symlink() else self._links.discard)(customer)
        fresh = signature is not None and signature[0] > time.time_ns() - int(SETTLE_S * 1e9)
        self._look_again(customer, _Again(signature, time.monotonic() + SETTLE_S) if fresh else None)
        return event

    def _look_again(self, customer: str, again: _Again | None) -> None:
        # Without a watcher nobody would look; `start` looks at everything.
        if again is not None and self._watcher.running:
            self._again[customer] = again
        else:
            self._again.pop(customer, None)

    def _update(self, customer: str) -> StoreEvent | None:
        """Do what the customer's file asks for now. Called under its lock."""
        if not os.path.lexists(self._path(customer)):
            if not self.folder.is_dir():
                return None  # The whole folder went away: that is no reason to stop serving.
            self._forget(customer)
            removed = self.session.unload(customer)
            return StoreEvent("removed", customer, f"{self._path(customer)} was deleted") if removed else None
        again = self._again.get(customer)
        if customer in self.session.table or (again is not None and again.message):
            return self._bring(customer)
        self._forget(customer)
        return None

    def _forget(self, customer: str) -> None:
        self._read.pop(customer, None)
        self._again.pop(customer, None)
        self._links.discard(customer)

    def _refresh(self, customer: str) -> None:
        """`_update`, whatever happens; the same complaint is made once."""
        before = self._again.get(customer)
        try:
            with self._lock_of(customer):
                event = self._update(customer)
        except Exception as error:
            event = _event_of(customer, error)
            if before is not None and before.message == event.message:
                return
        self._tell(event)

    def _follow(self, names: set[str]) -> None:
        customers = {name: customer_of(name) for name in names}
        for customer in filter(None, customers.values()):
            self._refresh(customer)
        if None in customers.values():
            # A folder of versions may have been swapped, to which customers' files are links.
            for customer in list(self._links):
                if (known := self._read.get(customer)) and known[1] != _signature(self._path(customer)):
                    self._refresh(customer)

        self._look_at_some_again()

    def _complain(self, message: str) -> None:
        self._tell(StoreEvent("failed", "", f"{message}; what is loaded goes on being served"))

    def _look_at_some_again(self) -> None:
        for customer, again in list(self._again.items()):
            now = _signature(self._path(customer))
            # A deletion is told; a file that is missing here may be missing with its whole folder.
            if now is not None and (again.signature is None or again.signature != now):
                self._refresh(customer)
            elif time.monotonic() > again.until:
                with self._lock_of(customer):
                    if self._again.get(customer) is again:
                        del self._again[customer]

    def _compare(self, again: bool) -> None:
        """Catch up with what changed while nobody watched."""
        found = set(customer_ids(self.folder))
        if again and self._read and not found:
            # More likely a folder that is not mounted than one whose customers have all gone.
            self._complain(f"{self.folder} is empty")
            return
        for customer in found | self._read.keys():
            if self._watcher.stopping:
                return
            known = self._read.get(customer)
            if known is None and customer not in self.session.table:
                continue
            if known is None or known[1] is None or known[1] != _signature(self._path(customer)):
                self._refresh(customer)

    def _tell(self, event: StoreEvent | None) -> None:
        if event is None:
            return
        try:
            if self._report is not None:
                self._report(event)
            else:
                level = logging.INFO if event.kind in ("loaded", "removed") else logging.WARNING
                _log.log(level, "%s %s: %s", event.kind, event.customer, event.message)
        except Exception:
            # Neither a request nor the watcher may end because somebody cannot be told.
            _log.exception("the report of %r failed", event)

    def _path(self, customer: str) -> Path:
        return self.folder / f"{customer}{SUFFIX}"

    def _lock_of(self, customer: str) -> threading.Lock:
        return self._locks[hash(customer) % LOCKS]


def _event_of(customer: str, error: Exception) -> StoreEvent:
    message = " ".join(f"{error}".split()) or type(error).__name__
    if isinstance(error, InputError) and not isinstance(error, TableFullError):
        return StoreEvent("refused", customer, message)
    return StoreEvent(
        "failed", customer, message if isinstance(error, QrloraError) else f"{type(error).__name__}: {message}"
    )


def _signature(path: Path) -> Signature | None:
    """Time, size and identity of what a path leads to; None where there is nothing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev
