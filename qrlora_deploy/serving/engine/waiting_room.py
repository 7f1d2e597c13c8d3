"""All requests of an engine, from their arrival to their end: each one ends once, whatever happens."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.serving.engine.admission import Place
from qrlora_deploy.serving.engine.batching import Shapes, cut
from qrlora_deploy.serving.engine.fairness import FairQueue
from qrlora_deploy.serving.engine.gate import Gate
from qrlora_deploy.serving.engine.handover import EndOfTurn
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.pace import Pace
from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.engine.requests import Request, WaitingRow
from qrlora_deploy.serving.engine.rows import Load, Row
from qrlora_deploy.serving.engine.running import Outcome
from qrlora_deploy.serving.refusals import DrainingError

CLOSED = "the server ended before the request was answered"

Ended = tuple[Request, QrloraError | None]


class WaitingRoom:
    """Requests that have a place, the queue of their rows, and the batches that were taken from it.

    Safe for many threads. Nothing here takes long, and no future is told anything
    while the lock is held.

    Args:
        limits: the bounds.
        quotas: rows a second by customer.
        shapes: of batches.
        pace: what the engine measures of itself.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(self, limits: Limits, quotas: Quotas, shapes: Shapes, pace: Pace, clock: Callable[[], float]) -> None:
        self._limits, self._shapes, self._pace, self._clock = limits, shapes, pace, clock
        self._lock = threading.Lock()
        self._work, self._idle = threading.Condition(self._lock), threading.Condition(self._lock)
        # All that follows is read and written under the lock.
        self._gate = Gate(limits, quotas, pace, clock)
        self._queue: FairQueue[WaitingRow] = FairQueue()
        self._batches: deque[list[WaitingRow]] = deque()
        self._open: set[Request] = set()
        self._oldest_s = 0.0
        self._rows = self._tokenised = self._telling = self._running = 0
        self._closed = False
        self._waking = EndOfTurn(self._wake)

    def reserve(self, load: Load, customers: Sequence[str | None], deadline_s: float | None) -> Place:
        """As `Engine.admit`."""
        with self._lock:
            return self._gate.admit(load, customers, deadline_s)

    def check_room(self) -> None:
        """As `Engine.check_room`."""
        with self._lock:
            self._gate.check_room()

    def give_back(self, place: Place) -> None:
        """As `Engine.release`."""
        with self._lock:
            if not place.used:
                self._gate.admission.release(place)
                self._tell_idle()

    def enter(self, place: Place, rows: Sequence[Row]) -> Request:
        """Make a request of a place and its rows; they are not queued yet.

        Raises:
            InputError: the place was used or given back.
        """
        request = Request(place, rows, self._clock())
        request.future.if_cancelled = partial(self._cancel, request)
        with self._lock:
            if place.used or place.released:
                raise InputError("a ticket is given to submit once, and not after release")
            place.used = True
            self._tokenised += len(rows)
            self._open.add(request)
        return request

    def enqueue(self, request: Request) -> None:
        """Queue the rows of a request, which from now on has the size that they have.

        Raises:
            DrainingError: nothing is answered any more.
        """
        tokens = sum(row.length for row in request.waiting)
        with self._lock:
            if self._closed:
                raise DrainingError(CLOSED)
            if request.ended:
                return
            self._gate.admission.has_tokens(request.place, tokens)
            if not self._queue.rows:
                self._oldest_s = self._clock()
            self._queue.push(request.waiting)
            ready = self._may_draw()
        if ready:
            # What comes in the same turn of an event loop runs together.
            self._waking.ask()

    def _wake(self) -> None:
        with self._lock:
            if self._may_draw():
                self._work.notify()

    def next_batch(self) -> list[WaitingRow] | None:
        """The next batch; waits for one. None: the room is closed. Call `ran` when it has run.

        While a batch runs, rows are collected for the next one: it is given out when it is full, or else when the
        run has ended.
        """
        while True:
            with self._lock:
                while not (self._closed or self._batches) and (wait_s := self._wait_s()) != 0:
                    self._work.wait(wait_s)
                if self._closed:
                    return None
                if self._batches:
                    self._running += 1
                    return self._batches.popleft()
                drawn, shapes = self._queue.draw(self._window()), self._shapes_now()
                # Nobody else draws while these are sorted.
                self._running += 1
            batches: list[list[WaitingRow]] = []
            try:
                # Without the lock: sorting thousands of rows takes milliseconds.
                batches = cut(drawn, shapes)
            finally:
                with self._lock:
                    self._running -= 1
                    self._batches.extend(batches)
                    if len(batches) > 1:
                        self._work.notify()

    def ran(self) -> None:
        """A batch has run; whatever waits may be given out now."""
        with self._lock:
            self._running -= 1
            if self._batches or self._queue.rows:
                self._work.notify()

    def settle(self, outcomes: Iterable[Outcome]) -> None:
        """Give each row's outcome to its request, and end those that have all of theirs or an error."""
        ended: dict[Request, QrloraError | None] = {}
        with self._lock:
            for row, outcome in outcomes:
                request = row.request
                if isinstance(outcome, QrloraError):
                    ended.setdefault(request, outcome)
                    continue
                self._rows += 1
                request.answers[row.number] = outcome
                request.left -= 1
                if not request.left:
                    ended.setdefault(request, None)
        self.end(ended.items())

    def end(self, requests: Iterable[Ended]) -> None:
        """Tell each request its answers or its error, unless it has ended."""
        with self._lock:
            ending = [(request, error) for request, error in requests if self._take_out(request)]
            for _, error in ending:
                if error is not None:
                    self._gate.rejected[error.kind] += 1
            self._telling += 1
        for request, error in ending:
            # Whatever a future does, the others are told.
            with suppress(Exception):
                request.tell(error)
        with self._lock:
            self._telling -= 1
            self._tell_idle()

    def end_all(self, error: QrloraError) -> None:
        """Tell an error to every request that is here."""
        with self._lock:
            requests = list(self._open)
        self.end((request, error) for request in requests)

    def drain(self, timeout_s: float) -> bool:
        """As `Engine.drain`."""
        with self._lock:
            self._gate.draining = True
            self._work.notify_all()
            return self._idle.wait_for(self._is_idle, timeout_s)

    def close(self) -> None:
        """Let nobody in, and give out no more batches."""
        with self._lock:
            self._gate.draining = self._closed = True
            self._work.notify_all()

    def stats(self) -> EngineStats:
        """As `Engine.stats`, as far as it is known here."""
        with self._lock:
            drawn = [row for batch in self._batches for row in batch if not row.request.ended]
            return EngineStats(
                rows=self._rows,
                queued_rows=self._queue.rows + len(drawn),
                queued_tokens=self._queue.tokens + sum(row.length for row in drawn),
                tokenised_rows=self._tokenised,
                rejected=tuple(sorted(self._gate.rejected.items())),
                draining=self._gate.draining,
            )

    def _may_draw(self) -> bool:
        """Whether rows may be taken from the queue: nothing runs, or there are enough for a full batch."""
        return not self._running or self._queue.tokens >= min(self._window(), self._limits.max_batch_tokens)

    def _window(self) -> int:
        return self._pace.window_tokens(self._limits.window_s, self._limits.max_batch_tokens)

    def _shapes_now(self) -> Shapes:
        if self._limits.max_padding_tokens is not None:
            return self._shapes
        known = self._pace.padding_tokens(self._limits.max_batch_tokens)
        return self._shapes if known is None else self._shapes.with_padding(known)

    def _wait_s(self) -> float | None:
        """How long to wait before rows are taken; None: until one comes, or until a batch has run."""
        if not self._queue.rows or not self._may_draw():
            return None
        if self._gate.draining or self._queue.tokens >= self._limits.max_batch_tokens:
            return 0
        return max(0.0, self._oldest_s + self._limits.max_wait_s - self._clock())

    def _cancel(self, request: Request) -> None:
        with self._lock:
            mine = self._take_out(request)
            self._tell_idle()
        if mine:
            request.future.set_running_or_notify_cancel()

    def _take_out(self, request: Request) -> bool:
        """Forget a request, with what is reserved for it and its rows that wait. False where it has ended."""
        if request.ended:
            return False
        request.ended = True
        self._open.discard(request)
        if request.left:
            self._queue.discard(request.waiting)
        # The rows know their request: kept, they would be a cycle, and the collector's work.
        request.waiting = []
        self._gate.admission.release(request.place)
        return True

    def _is_idle(self) -> bool:
        return not self._gate.admission.held.rows and not self._telling

    def _tell_idle(self) -> None:
        if self._gate.draining and self._is_idle():
            self._idle.notify_all()
