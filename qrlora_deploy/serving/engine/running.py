"""Runs a batch so that a row fails for nothing but itself."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from qrlora_deploy.errors import QrloraError, first_line
from qrlora_deploy.runtime.sessions.versions import Version
from qrlora_deploy.serving.engine.batching import Shapes
from qrlora_deploy.serving.engine.collating import Collator
from qrlora_deploy.serving.engine.durations import Durations
from qrlora_deploy.serving.engine.models import Model
from qrlora_deploy.serving.engine.pace import Pace
from qrlora_deploy.serving.engine.requests import WaitingRow
from qrlora_deploy.serving.engine.rows import RowAnswer, Run
from qrlora_deploy.serving.engine.turns import Turns
from qrlora_deploy.serving.refusals import DeadlineError

MOST_LOADERS = 16
"""Threads that fetch customers who are not in the table: they wait for files, and each holds a row for a moment."""

Outcome = tuple[WaitingRow, RowAnswer | QrloraError]
"""A row and how it ended."""


class BatchRunner:
    """Runs batches, one after the other; what comes before a run and after it does not wait for other runs.

    Safe for many threads.

    Args:
        model: runs them.
        shapes: what it pads a batch to, for the pace.
        pace: is told of every run.
        clock: seconds, as `time.monotonic`.

    Attributes:
        batches: that were run.
        run_s: how long they took together.
        queue_s: how long the rows that were answered had waited, together.
        queued: the same for each of them.
        tokens: of those rows.
        padded_tokens: rows x length of the runs, as they were padded.
        last_run_s: when the last one ended, in seconds of the Unix epoch; 0: there was none.
        running: number of the run that is under way; 0: nothing runs.
    """

    def __init__(self, model: Model, shapes: Shapes, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        self.collator = Collator(model.bundle)
        self.batches = 0
        self.run_s = 0.0
        self.queue_s = 0.0
        self.queued = Durations()
        self.tokens = 0
        self.padded_tokens = 0
        self.last_run_s = 0.0
        self.running = self._begun = 0
        self._turn, self._counting = Turns(), threading.Lock()
        self._model, self._shapes, self._pace, self._clock = model, shapes, pace, clock
        rows = _most_rows(model)
        # One row is the base's, and some are held by those who fetch customers meanwhile.
        self._most_customers = None if rows is None else max(1, rows - 1 - loaders_of(model))

    def run(self, rows: Sequence[WaitingRow]) -> list[Outcome]:
        """How each row ends, without those whose request has ended already.

        A row whose deadline has passed is not run. A batch that fails is run again in halves, until what fails
        is a row by itself; one of more customers than the table has room for is run in halves at once.
        """
        wanted, outcomes = self._sorted_out(rows)
        if not wanted:
            return outcomes
        if len(wanted) == 1 or self._fits_the_table(wanted):
            try:
                answered = self._run(wanted)
                # Another batch ran first, and meanwhile a row was given up or its deadline has passed.
                return outcomes + (self.run(wanted) if answered is None else answered)
            except Exception as error:
                if len(wanted) == 1:
                    return [*outcomes, (wanted[0], as_ours(error))]
        half = len(wanted) // 2
        return outcomes + self.run(wanted[:half]) + self.run(wanted[half:])

    def _sorted_out(self, rows: Sequence[WaitingRow]) -> tuple[list[WaitingRow], list[Outcome]]:
        """The rows to run, and how those end whose deadline has passed."""
        now = self._clock()
        wanted = [row for row in rows if not row.request.ended]
        late: list[Outcome] = [(row, _late()) for row in wanted if _is_late(row, now)]
        return [row for row in wanted if not _is_late(row, now)] if late else wanted, late

    def _fits_the_table(self, rows: Sequence[WaitingRow]) -> bool:
        most = self._most_customers
        return most is None or len({row.customer for row in rows}) <= most

    def _run(self, rows: Sequence[WaitingRow]) -> list[Outcome] | None:
        """The answers of rows; None where some of them are not wanted any more when their turn comes."""
        inputs = self.collator.batch([row.row for row in rows])
        customers = [row.customer for row in rows]
        with self._turn:
            start_s = self._clock()
            if any(row.request.ended or _is_late(row, start_s) for row in rows):
                return None
            tokens = sum(row.length for row in rows)
            self._pace.begins(tokens)
            with self._under_way():
                logits, versions = self._model.answer(inputs, customers)
            run = self._counted(rows, tokens, start_s)
        # After the turn, so that the next run does not wait for it.
        self._count_waits(rows, start_s)
        return [
            (row, self._answer(row, values, version, run))
            for row, values, version in zip(rows, logits, versions, strict=True)
        ]

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """For the time of a run, failed or not: who watches sees by the number that it does not end."""
        self._begun += 1
        self.running = self._begun
        try:
            yield
        finally:
            self.running = 0

    def _answer(self, row: WaitingRow, logits: np.ndarray, version: Version, run: Run) -> RowAnswer:
        answering = version.answering
        own = answering.own(self.collator.unpadded(logits, row.length))
        return RowAnswer(own, answering.labels, version.digest, answering.thresholds, row.row.words, run)

    def _counted(self, rows: Sequence[WaitingRow], tokens: int, start_s: float) -> Run:
        """Count a run that has just ended."""
        end_s = self._clock()
        seconds = end_s - start_s
        length = self._shapes.length(max(row.length for row in rows))
        padded = self._shapes.rows(len(rows), length) * length
        self._pace.ran(len(rows), padded, seconds)
        self.tokens += tokens
        self.padded_tokens += padded
        self.batches += 1
        self.last_run_s = time.time()
        self.run_s += seconds
        return Run(start_s, end_s, len(rows), padded)

    def _count_waits(self, rows: Sequence[WaitingRow], start_s: float) -> None:
        with self._counting:
            for row in rows:
                waited_s = start_s - row.request.queued_s
                self.queue_s += waited_s
                self.queued.add(waited_s)


def loaders_of(model: Model) -> int:
    """Threads that fetch customers of a model: they hold less than half of a small table."""
    rows = _most_rows(model)
    return MOST_LOADERS if rows is None else max(1, min(MOST_LOADERS, (rows - 1) // 2))


def _most_rows(model: Model) -> int | None:
    rows: int | None = getattr(model.table, "max_rows", None)
    return rows


def as_ours(error: BaseException) -> QrloraError:
    """An error that a client may see; what a library or a mistake of ours raised is a failure of the engine."""
    return error if isinstance(error, QrloraError) else QrloraError(f"the engine failed: {first_line(error)}")


def _is_late(row: WaitingRow, now: float) -> bool:
    deadline = row.request.place.deadline_s
    return deadline is not None and now >= deadline


def _late() -> DeadlineError:
    return DeadlineError("the deadline passed before the request was answered; it was not run")
