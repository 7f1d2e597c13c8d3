"""The engine within this process: a queue, and one thread that runs batches from it."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from qrlora_deploy.errors import InputError, MalformedInputError, QrloraError
from qrlora_deploy.serving.engine.admission import Admission, Place
from qrlora_deploy.serving.engine.batching import Shapes, cut
from qrlora_deploy.serving.engine.fairness import FairQueue
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.models import Model
from qrlora_deploy.serving.engine.pace import Pace
from qrlora_deploy.serving.engine.protocol import EngineStats, Ticket
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.engine.requests import Request, WaitingRow
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer
from qrlora_deploy.serving.engine.running import BatchRunner, Outcome, as_ours
from qrlora_deploy.serving.refusals import DeadlineError, DrainingError

LOG = logging.getLogger(__name__)

LOADERS = 4
"""Threads that fetch customers who are not in the table; runs go on meanwhile."""

ENDED = "the server ended before the request was answered"

Ended = tuple[Request, QrloraError | None]


class LocalEngine:
    """Answers rows of any customers in batches, with one thread that runs them. Safe for many threads.

    Rows wait by customer and are taken in fair order (`FairQueue`); those that are taken together are sorted by
    length and cut into batches (`cut`). Customers who are not in the table are fetched before their rows are
    queued, so one who is unknown fails its own request alone.

    Args:
        model: a `SwitchableSession` or a `MergedModel`.
        limits: the bounds; None: the usual ones.
        quotas: rows a second by customer; None: as many as they like.
        clock: seconds, as `time.monotonic`.

    Attributes:
        manifest: of the bundle that is served.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits | None = None,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manifest = model.manifest
        self._model, self._limits, self._clock = model, limits or Limits(), clock
        self._quotas = quotas or Quotas()
        self._pace = Pace()
        self._admission = Admission(self._limits, self._pace)
        self._queue = FairQueue()
        self._shapes = Shapes.of(self._limits, model.buckets)
        self._runner = BatchRunner(model, self._shapes, self._pace, clock)
        self._lock = threading.Lock()
        self._work, self._idle = threading.Condition(self._lock), threading.Condition(self._lock)
        # All that follows is read and written under the lock.
        self._open: set[Request] = set()
        self._batches: deque[list[WaitingRow]] = deque()
        self._oldest_s = 0.0
        self._rows = self._tokenised = self._telling = 0
        self._rejected: Counter[str] = Counter()
        self._draining = self._closed = False
        self._loaders = ThreadPoolExecutor(LOADERS, thread_name_prefix="customer-loader")
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def admit(self, load: Load, customers: Sequence[str | None], deadline_s: float | None = None) -> Place:
        """As `Engine.admit`."""
        with self._lock:
            try:
                if self._draining:
                    raise DrainingError("the server is ending and takes no new request")
                if deadline_s is not None and self._clock() >= deadline_s:
                    raise DeadlineError("the deadline passed before the request came")
                return self._reserve(load, customers, deadline_s)
            except QrloraError as error:
                self._rejected[error.kind] += 1
                raise

    def _reserve(self, load: Load, customers: Sequence[str | None], deadline_s: float | None) -> Place:
        place = self._admission.reserve(load, customers, deadline_s)
        try:
            self._quotas.take(place.customers)
        except QrloraError:
            self._admission.release(place)
            raise
        return place

    def release(self, ticket: Ticket) -> None:
        """As `Engine.release`; a request that was given to `submit` keeps its place until it ends."""
        place = _place(ticket)
        with self._lock:
            if not place.used:
                self._admission.release(place)
                self._tell_idle()

    def submit(self, ticket: Ticket, rows: Sequence[Row]) -> "Future[list[RowAnswer]]":
        """As `Engine.submit`.

        Raises:
            InputError: the ticket was used or released before.
        """
        place = _place(ticket)
        with self._lock:
            if place.used or place.released:
                raise InputError("a ticket is given to submit once, and not after release")
            place.used = True
            self._tokenised += len(rows)
        return self._begin(Request(place, rows, self._clock()))

    def stats(self) -> EngineStats:
        """As `Engine.stats`."""
        runner = self._runner
        with self._lock:
            drawn = [row for batch in self._batches for row in batch]
            return EngineStats(
                rows=self._rows,
                batches=runner.batches,
                queued_rows=self._queue.rows + len(drawn),
                queued_tokens=self._queue.tokens + sum(row.length for row in drawn),
                tokenised_rows=self._tokenised,
                rejected=tuple(sorted(self._rejected.items())),
                queue_s=runner.queue_s,
                run_s=runner.run_s,
                resident=len(self._model.table),
                loads=self._model.table.loads,
                evictions=self._model.table.evictions,
                draining=self._draining,
            )

    def drain(self, timeout_s: float) -> bool:
        """As `Engine.drain`; requests that were admitted may still be given to `submit`."""
        with self._lock:
            self._draining = True
            self._work.notify()
            return self._idle.wait_for(self._is_idle, timeout_s)

    def close(self) -> None:
        """As `Engine.close`; the batch that runs is answered."""
        with self._lock:
            self._draining = self._closed = True
            self._work.notify()
        self._loaders.shutdown(wait=False, cancel_futures=True)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._end_all(DrainingError(ENDED))

    def _begin(self, request: Request) -> "Future[list[RowAnswer]]":
        """Check a request, and queue it or have its customers fetched first."""
        with self._lock:
            self._open.add(request)
        request.future.add_done_callback(lambda future: self._cancel(request) if future.cancelled() else None)
        try:
            self._check(request)
            missing = self._model.lacks(list(request.place.customers))
            if missing:
                self._loaders.submit(self._bring, request, missing)
            else:
                self._enqueue(request)
        except Exception as error:
            # Also of a pool that was shut down meanwhile.
            self._end([(request, DrainingError(ENDED) if self._closed else as_ours(error))])
        return request.future

    def _check(self, request: Request) -> None:
        rows, place = request.rows, request.place
        if Counter(row.customer for row in rows) != place.customers:
            raise MalformedInputError("the rows are not of the customers that their ticket is for")
        self._runner.collator.check(rows)
        request.wait()
        load = Load(len(rows), sum(row.length for row in request.waiting), place.load.size_bytes)
        with self._lock:
            if not place.released:
                self._admission.correct(place, load)

    def _bring(self, request: Request, customers: Iterable[str]) -> None:
        """Fetch customers, in a thread of the loaders."""
        try:
            for customer in customers:
                if not request.ended:
                    self._model.bring([customer])
            self._enqueue(request)
        except Exception as error:
            self._end([(request, as_ours(error))])

    def _enqueue(self, request: Request) -> None:
        with self._lock:
            if self._closed:
                raise DrainingError(ENDED)
            if request.ended:
                return
            if not self._queue.rows:
                self._oldest_s = self._clock()
            self._queue.push(request.waiting)
            self._work.notify()

    def _cancel(self, request: Request) -> None:
        with self._lock:
            mine = self._take_out(request)
            self._tell_idle()
        if mine:
            request.future.set_running_or_notify_cancel()

    def _serve(self) -> None:
        """The thread: batches until the engine is closed, whatever happens."""
        while True:
            try:
                batch = self._next_batch()
                if batch is None:
                    return
                self._settle(self._runner.run(batch))
            except BaseException as error:
                LOG.exception("the engine failed; every request that it held is refused")
                self._end_all(as_ours(error))

    def _next_batch(self) -> list[WaitingRow] | None:
        """The next batch; waits for one. None: the engine is closed."""
        while True:
            with self._lock:
                if self._closed:
                    return None
                if self._batches:
                    return self._batches.popleft()
                drawn = self._draw()
            # Without the lock: sorting thousands of rows takes milliseconds.
            batches = cut(drawn, self._shapes)
            with self._lock:
                self._batches.extend(batches)

    def _draw(self) -> list[WaitingRow]:
        """Rows in fair order, as soon as there are enough; none where the engine is closed."""
        while not self._closed and (wait_s := self._wait_s()) != 0:
            self._work.wait(wait_s)
        tokens = self._pace.window_tokens(self._limits.window_s, self._limits.max_batch_tokens)
        return self._queue.draw(tokens)

    def _wait_s(self) -> float | None:
        """How long to wait before rows are taken; None: until one comes."""
        if not self._queue.rows:
            return None
        if self._draining or self._queue.tokens >= self._limits.max_batch_tokens:
            return 0
        return max(0.0, self._oldest_s + self._limits.max_wait_s - self._clock())

    def _settle(self, outcomes: Iterable[Outcome]) -> None:
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
        self._end(ended.items())

    def _end(self, requests: Iterable[Ended]) -> None:
        """Tell each request its answers or its error, unless it has ended."""
        with self._lock:
            ending = [(request, error) for request, error in requests if self._take_out(request)]
            self._rejected.update(error.kind for _, error in ending if error is not None)
            self._telling += 1
        for request, error in ending:
            _tell(request, error)
        with self._lock:
            self._telling -= 1
            self._tell_idle()

    def _end_all(self, error: QrloraError) -> None:
        with self._lock:
            requests = [(request, error) for request in self._open]
        self._end(requests)

    def _take_out(self, request: Request) -> bool:
        """Forget a request, with what is reserved for it and its rows that wait. False where it has ended."""
        if request.ended:
            return False
        request.ended = True
        self._open.discard(request)
        if request.left:
            self._queue.discard(request.waiting)
        self._admission.release(request.place)
        return True

    def _is_idle(self) -> bool:
        return not self._admission.held.rows and not self._telling

    def _tell_idle(self) -> None:
        if self._draining and self._is_idle():
            self._idle.notify_all()


def _place(ticket: Ticket) -> Place:
    if not isinstance(ticket, Place):
        raise InputError(f"a ticket comes from admit; {type(ticket).__name__} is none")
    return ticket


def _tell(request: Request, error: QrloraError | None) -> None:
    if not request.future.set_running_or_notify_cancel():
        return
    if error is None:
        request.future.set_result([answer for answer in request.answers if answer is not None])
    else:
        request.future.set_exception(error)
