"""A decoder behind a server: requests are let in, wait in fair order, and are written side by side by one thread."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from qrlora_deploy.errors import InputError, MalformedInputError, QrloraError
from qrlora_deploy.runtime.generation.requests import GenerationEvent, GenerationRequest
from qrlora_deploy.runtime.generation.session import GenerationSession
from qrlora_deploy.serving.engine.admission import Place, place_of
from qrlora_deploy.serving.engine.fairness import FairQueue
from qrlora_deploy.serving.engine.gate import Gate
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.models import NoTable, Table
from qrlora_deploy.serving.engine.pace import Pace
from qrlora_deploy.serving.engine.protocol import EngineStats, Ticket
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer
from qrlora_deploy.serving.engine.running import as_ours
from qrlora_deploy.serving.engine.waiting_room import CLOSED
from qrlora_deploy.serving.generation.counting import Counts, WriterStats
from qrlora_deploy.serving.generation.writing import Asked, Tell, Writing
from qrlora_deploy.serving.refusals import DrainingError

LOG = logging.getLogger(__name__)


class TextEngine:
    """Writes answers of any customers side by side: an `Engine`, whose answers are not rows but events.

    A session is given as many answers as it has rows; the others wait here, customers in turn, each with as many
    tokens a turn, so that one customer's many requests keep nobody else waiting.

    Args:
        session: is closed with the engine.
        limits: of what may wait: `max_queue_rows` answers, `max_queue_tokens` tokens of prompts and answers.
        quotas: answers a second by customer.
        clock: seconds, as `time.monotonic`.

    Attributes:
        session: as given.
        manifest: of its bundle.
    """

    def __init__(
        self,
        session: GenerationSession,
        limits: Limits | None = None,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session, self.manifest, self._clock = session, session.bundle.manifest, clock
        self._pace = Pace()
        self._lock = threading.Lock()
        self._work, self._idle = threading.Condition(self._lock), threading.Condition(self._lock)
        # All that follows is read and written under the lock; but the answers that run belong to the thread.
        # How long an answer takes is known at its end.
        bounds = replace(limits or Limits(), max_queue_s=None)
        self._gate = Gate(bounds, quotas or Quotas(), self._pace, clock)
        self._queue: FairQueue[Asked] = FairQueue()
        self._counts, self._closed = Counts(), False
        self._running: list[Asked] = []
        self._paced_s = 0.0
        self._thread = threading.Thread(target=self._serve, name="text-engine", daemon=True)
        self._thread.start()

    @property
    def prompts(self) -> GenerationSession:
        """The session, which reads them."""
        return self.session

    def check_customer(self, customer: str | None) -> None:
        """Make sure that a customer is there. It may wait for a file.

        Raises:
            UnknownCustomerError: it is not.
            InputError: its file cannot be served.
        """
        self.session.check_customer(customer)

    def check_room(self) -> None:
        """As `Engine.check_room`."""
        with self._lock:
            self._gate.check_room()

    def admit(self, load: Load, customers: Sequence[str | None], deadline_s: float | None = None) -> Place:
        """As `Engine.admit`: an answer is a row, and its tokens are those of its prompt and of itself at most."""
        with self._lock:
            return self._gate.admit(load, customers, deadline_s)

    def release(self, ticket: Ticket) -> None:
        """As `Engine.release`; a request that was given to `write` keeps its place until its answers end."""
        place = place_of(ticket)
        with self._lock:
            if not place.used:
                self._release(place)

    def submit(self, ticket: Ticket, rows: Sequence[Row]) -> "Future[list[RowAnswer]]":
        """Refuses rows.

        Raises:
            MalformedInputError: always.
        """
        self.release(ticket)
        raise MalformedInputError("the model writes text; ask /v1/completions")

    def write(self, ticket: Ticket, requests: Sequence[GenerationRequest], tell: Tell, every: bool = True) -> Writing:
        """Queue requests, whose prompts are ids of tokens; the place becomes as large as they are.

        Args:
            ticket: of `admit`.
            requests: one for each answer.
            tell: gets events, in the engine's thread; each answer's last one has its `answer`, which may be an error.
            every: False: those last ones alone.

        Raises:
            InputError: the ticket was used or released before.
            DrainingError: the engine is closed.
        """
        place, now = place_of(ticket), self._clock()
        writing = Writing(place, tell, every, len(requests))
        for number, request in enumerate(requests):
            writing.answers.append(Asked(writing, number, request, len(request.prompt) + request.max_tokens, now))
        with self._lock:
            if place.used or place.released:
                raise InputError("a ticket is given to write once, and not after release")
            if self._closed:
                raise DrainingError(CLOSED)
            place.used = True
            tokens = sum(asked.length for asked in writing.answers)
            self._gate.admission.has_tokens(place, tokens)
            self._queue.push(writing.answers)
            self._work.notify()
        return writing

    def cancel(self, writing: Writing) -> None:
        """Nobody wants these answers any more: those that wait are forgotten, those that run end by the next step."""
        with self._lock:
            writing.cancelled = True
            self._queue.discard(writing.answers)
            for asked in writing.answers:
                if asked.stream is not None:
                    asked.stream.cancel()
                elif not (asked.ended or asked in self._running):
                    self._leave(asked, cancelled=True)

    def stats(self) -> EngineStats:
        """As `Engine.stats`; a batch is a step, and `run_tokens` are those that were written."""
        customers = self.session.customers
        table: Table = NoTable() if customers is None else customers.table
        with self._lock:
            return replace(
                self._counts.engine_stats(),
                queued_rows=self._queue.rows,
                queued_tokens=self._queue.tokens,
                rejected=tuple(sorted(self._gate.rejected.items())),
                resident=len(table),
                loads=table.loads,
                evictions=table.evictions,
                draining=self._gate.draining,
                running=self._counts.steps + 1 if self._running else 0,
            )

    def written(self) -> WriterStats:
        """Counters that answers of text alone have."""
        with self._lock:
            return replace(self._counts.written, running=len(self._running))

    def drain(self, timeout_s: float) -> bool:
        """As `Engine.drain`; answers that were admitted are written to their end."""
        with self._lock:
            self._gate.draining = True
            return self._idle.wait_for(lambda: not self._gate.admission.held.rows, timeout_s)

    def close(self) -> None:
        """As `Engine.close`; what is being written ends as it is, by a `DrainingError`."""
        with self._lock:
            self._gate.draining = self._closed = True
            self._work.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _serve(self) -> None:
        """The thread: steps for as long as there is anything to write."""
        while self._wait():
            try:
                self._step()
            except BaseException as error:
                LOG.exception("the text engine failed; every answer that was being written is refused")
                self._end_all(as_ours(error))
        self._end_all(DrainingError(CLOSED))
        self.session.close()

    def _wait(self) -> bool:
        """Give the session who is next; whether there is anything to write before the end."""
        with self._lock:
            while not (self._closed or self._running or self._queue.rows):
                self._work.wait()
            if self._closed:
                return False
            if not self._running:
                # From here on it is known how long answers take.
                self._paced_s = self._clock()
            drawn: list[Asked] = []
            while self._queue.rows and len(self._running) < self.session.max_rows:
                drawn += self._queue.draw(1)
                self._running.append(drawn[-1])
                self._counts.began(self._clock() - drawn[-1].queued_s)
        for asked in drawn:
            self._begin(asked)
        return True

    def _begin(self, asked: Asked) -> None:
        try:
            stream = self.session.submit(asked.request, asked.number)
        except QrloraError as error:
            self._end(asked, asked.failed(error, self.manifest.base_digest))
            return
        with self._lock:
            asked.stream = stream
            if asked.writing.cancelled:
                stream.cancel()

    def _step(self) -> None:
        """A token of every answer, and those that wait for them are told."""
        if not self._running:
            return
        start = self._clock()
        stream = self._running[0].stream
        assert stream is not None
        stream.wait()
        now = self._clock()
        with self._lock:
            self._counts.stepped(now - start, time.time())
        ended = []
        for asked in list(self._running):
            assert asked.stream is not None
            for event in asked.stream.ready():
                self._note(asked, event, now)
                if event.answer is not None:
                    ended.append(asked)
                    self._end(asked, event)
                elif asked.writing.every:
                    asked.tell(event)
        if ended:
            with self._lock:
                self._pace.ran(len(ended), sum(asked.length for asked in ended), now - self._paced_s)
                self._paced_s = now

    def _note(self, asked: Asked, event: GenerationEvent, now: float) -> None:
        with self._lock:
            self._counts.wrote(len(event.choices))
            if event.choices and not asked.begun:
                asked.begun = True
                self._counts.first_token(now - asked.queued_s)

    def _end(self, asked: Asked, event: GenerationEvent) -> None:
        """Tell an answer's last event, once its place is free."""
        answer = event.answer
        assert answer is not None
        with self._lock:
            if asked in self._running:
                self._running.remove(asked)
            if answer.error is not None:
                self._gate.rejected[answer.error.kind] += 1
            cancelled = answer.error is not None or answer.finish_reason == "cancelled"
            self._leave(asked, cancelled, answer.prompt_tokens, answer.reused_tokens)
        asked.tell(event)

    def _end_all(self, error: QrloraError) -> None:
        """Refuse what waits and what runs."""
        with self._lock:
            waiting = []
            while self._queue.rows:
                waiting += self._queue.draw(1)
            running = list(self._running)
            for asked in running:
                if asked.stream is not None:
                    asked.stream.cancel()
        for asked in (*running, *waiting):
            self._end(asked, asked.failed(error, self.manifest.base_digest))

    def _leave(self, asked: Asked, cancelled: bool, prompt_tokens: int = 0, reused_tokens: int = 0) -> None:
        """Count the end of an answer; with the last one of a place, that is free. Under the lock."""
        if asked.ended:
            return
        asked.ended = True
        self._counts.ended(prompt_tokens, reused_tokens, cancelled)
        asked.writing.left -= 1
        if not asked.writing.left:
            self._release(asked.writing.place)

    def _release(self, place: Place) -> None:
        self._gate.admission.release(place)
        if not self._gate.admission.held.rows:
            self._idle.notify_all()
