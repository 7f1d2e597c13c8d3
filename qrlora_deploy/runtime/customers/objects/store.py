"""Customers in an object store behind a session: read when they are asked for, and live soon after they change."""

import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.errors import InputError, NotReadyError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import SUFFIX
from qrlora_deploy.formats.customer_files import check_customer_id, read_customer_content
from qrlora_deploy.runtime.customers.events import Report, StoreEvent, event_of, is_refusal, tell
from qrlora_deploy.runtime.customers.objects.bucket import Bucket, Found
from qrlora_deploy.runtime.customers.objects.names import Names, hashes_of
from qrlora_deploy.runtime.customers.objects.patience import StoreDownError
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession

LOCKS = 1024
"""Customers share this many locks: enough that nobody waits for another customer's object, which may take seconds."""

READERS = 8
"""Objects that are read at once after they changed, of `MAX_SENT_BYTES` at most each."""

MAX_REFUSED = 10_000
"""Customers whose object cannot be served, or is gone, that are remembered until the next listing."""

POLL_S = 30.0
"""From one listing to the next."""

LISTING_SHARE = 0.1
"""Of the time, in which a large place is listed: it is listed less often than `poll_s` says where that takes more."""

JITTER = 0.2
"""Part of the time between listings by which each is moved, so that servers do not list in step."""


AWAY = "the store of this customer does not answer; try again soon"

CLOSE_S = 2.0
"""What `close` waits for a listing that is under way."""


@dataclass(frozen=True)
class ObjectStoreStats:
    """How an object store is doing.

    Attributes:
        up: it answered when it was asked last.
        customers: that the last whole listing showed.
        failures: questions to it that failed, attempts that were repeated among them.
        age_s: since the last whole listing was begun.
    """

    up: bool
    customers: int
    failures: int
    age_s: float

    def __add__(self, other: "ObjectStoreStats") -> "ObjectStoreStats":
        """What two processes see of one store: the worse of both, and all that failed."""
        return ObjectStoreStats(
            self.up and other.up,
            min(self.customers, other.customers),
            self.failures + other.failures,
            max(self.age_s, other.age_s),
        )


class ObjectStore:
    """Objects under a URL behind a session. Safe for many threads.

    The session's `fetch` becomes this store's: a customer that is not in the table is read when it is asked for, with
    the checks that a customer's file has. Between `start` and `close` a thread lists the place: a changed object of a
    customer in the table goes live, a deleted one is unloaded. A customer that no listing has shown is unknown without
    a question to the store, so that names that clients make up cost nothing. Where the store is down, or an object
    cannot be served, what was loaded before goes on.

    Args:
        session: where the customers go.
        bucket: the objects.
        report: called with every event, from any thread; without it events are logged.
        poll_s: seconds from one listing to the next.

    Raises:
        InputError: the session has a store or a `fetch` already.
    """

    def __init__(
        self, session: SwitchableSession, bucket: Bucket, report: Report | None = None, poll_s: float = POLL_S
    ) -> None:
        self.session, self.bucket, self._report, self._poll_s = session, bucket, report, poll_s
        # A customer is read and published under its lock: what was read before a change can then
        # never be published after it.
        self._locks = tuple(threading.Lock() for _ in range(LOCKS))
        self._listing = threading.Lock()
        self._names, self._listed_s = Names(), 0.0
        self._read: dict[str, bytes] = {}
        self._refused: OrderedDict[str, tuple[bytes | None, str, type[Exception]]] = OrderedDict()
        self._complaint = ""
        self._closing, self._thread = threading.Event(), threading.Thread(target=self._follow, daemon=True)
        if session.fetch is not None:
            raise InputError(f"{bucket.url}: the session has a store or a `fetch` already; close that one first")
        session.fetch = self.fetch

    def start(self) -> None:
        """List the place, and begin to follow it.

        Raises:
            QrloraError: there is no such place, or it does not answer.
        """
        self.look()
        self._thread.start()

    def close(self) -> None:
        """Stop to list and let go of the session; what is in its table stays there."""
        self._closing.set()
        if self._thread.is_alive():
            # A question that has no answer yet is not waited for: its thread ends with the process at the latest.
            self._thread.join(CLOSE_S)
        if self.session.fetch == self.fetch:
            self.session.fetch = None

    def stats(self) -> ObjectStoreStats:
        """How the store is doing."""
        patience = self.bucket.patience
        return ObjectStoreStats(patience.up, len(self._names), patience.failures, time.monotonic() - self._listed_s)

    def fetch(self, customer: str) -> None:
        """Bring a customer into the table, unless another request has just done so.

        Raises:
            UnknownCustomerError: the last listing has not shown it, and the store is not down; or it is gone since.
            InputError: the id is none, or its object is refused.
            NotReadyError: the store is down, or the whole place is not there.
            QrloraError: the table cannot grow.
        """
        check_customer_id(customer)
        if customer not in self._names:
            if not self.bucket.patience.up:
                # It may have come since the last listing.
                raise NotReadyError(AWAY)
            raise UnknownCustomerError(f"{self.bucket.url} held no customer {customer!r} when it was listed last")
        with self._lock_of(customer):
            if customer in self.session.table:
                return
            refused = self._refused.get(customer)
            if refused is not None:
                raise refused[2](refused[1])
            try:
                self._bring(customer)
            except StoreDownError as error:
                if not self._complaint:
                    self._complain(str(error))
                # Without the place: clients are told of it.
                raise NotReadyError(AWAY) from error

    def look(self) -> None:
        """List the place, and bring what has changed.

        Raises:
            QrloraError: there is no such place, or it does not answer; everything stays as it was.
        """
        with self._listing:
            began_s = time.monotonic()
            self._forget_those_not_in_table()
            parts, changed = list[np.ndarray](), dict[str, bytes]()
            gone = dict.fromkeys(self._read, b"")
            for page in self.bucket.pages():
                if self._closing.is_set():
                    return
                parts.append(hashes_of(customer for customer, _ in page))
                changed |= self._changed(page)
                for customer, _ in page:
                    gone.pop(customer, None)
            names = Names(parts)
            if not len(names) and len(self._names):
                # More likely a place that somebody has moved than one whose customers have all gone.
                raise self.bucket.emptied()
            self._names, self._listed_s = names, began_s
            self._refresh_all(changed | gone)

    def _forget_those_not_in_table(self) -> None:
        """Of those who were pushed out of it nothing is kept."""
        for customer in list(self._read):
            if customer not in self.session.table:
                self._read.pop(customer, None)

    def _changed(self, page: Iterable[Found]) -> dict[str, bytes]:
        """Customers in the table whose object is another one, and its mark; refusals of other objects are forgotten."""
        changed = {}
        for customer, mark in page:
            known, refused = self._read.get(customer), self._refused.get(customer)
            if refused is not None and refused[0] != mark:
                self._refused.pop(customer, None)
            # Of those that came from a packed file no mark is known.
            if known != mark and (known is not None or customer in self.session.table):
                changed[customer] = mark
        return changed

    def _refresh_all(self, listed: dict[str, bytes]) -> None:
        if listed:
            with ThreadPoolExecutor(READERS, thread_name_prefix="customer-reader") as pool:
                deque(pool.map(self._refresh, listed.keys(), listed.values()), maxlen=0)

    def _refresh(self, customer: str, mark: bytes) -> None:
        """Do what the listing asks for, whatever happens: what is in the table stays where it cannot be done."""
        if self._closing.is_set():
            return
        with self._lock_of(customer):
            try:
                if customer in self.session.table:
                    self._bring(customer)
            except UnknownCustomerError:
                self._read.pop(customer, None)
                if self.session.unload(customer):
                    self._tell(StoreEvent("removed", customer, f"{self._place(customer)} was deleted"))
            except Exception as error:
                # Of one that is refused the mark is known now; others are tried again after the next listing.
                if is_refusal(error):
                    self._read[customer] = mark
                elif not isinstance(error, StoreDownError):
                    self._tell(event_of(customer, error))

    def _bring(self, customer: str) -> None:
        """Read a customer and publish it where it does something new. Called under its lock."""
        mark = None
        try:
            content, mark = self.bucket.read(customer)
            coefficients = read_customer_content(content, self._place(customer))
            there = self.session.holds(customer, coefficients)
            if not there:
                self.session.load(customer, coefficients)
        except Exception as error:
            if is_refusal(error):
                self._refuse(customer, mark, error)
            raise
        self._read[customer] = mark
        self._refused.pop(customer, None)
        if not there:
            self._tell(StoreEvent("loaded", customer, f"{self._place(customer)} is live", coefficients.digest))

    def _refuse(self, customer: str, mark: bytes | None, error: Exception) -> None:
        """Remember what is wrong with an object until it is another one: it is not read again for every request."""
        self._refused[customer] = mark, str(error), type(error)
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
        if not isinstance(error, UnknownCustomerError):
            self._tell(event_of(customer, error))

    def _follow(self) -> None:
        """The thread: list again and again, whatever happens."""
        took_s = 0.0
        while not self._closing.wait(self._pause_s(took_s)):
            began_s = time.monotonic()
            try:
                self.look()
                self._complaint = ""
            except Exception as error:
                self._complain(event_of("", error).message)
            took_s = time.monotonic() - began_s

    def _pause_s(self, took_s: float) -> float:
        return max(self._poll_s, took_s / LISTING_SHARE) * random.uniform(1 - JITTER, 1 + JITTER)

    def _complain(self, message: str) -> None:
        if message != self._complaint:
            self._complaint = message
            self._tell(StoreEvent("failed", "", f"{message}; what is loaded goes on being served"))

    def _tell(self, event: StoreEvent) -> None:
        tell(self._report, event)

    def _place(self, customer: str) -> str:
        return f"{self.bucket.url}/{customer}{SUFFIX}"

    def _lock_of(self, customer: str) -> threading.Lock:
        return self._locks[hash(customer) % LOCKS]
