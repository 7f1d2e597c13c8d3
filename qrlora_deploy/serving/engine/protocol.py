"""What a front asks of an engine, wherever that runs."""

from collections import Counter
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Protocol

from qrlora_deploy.runtime.bundle.manifest import Manifest
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer


@dataclass(frozen=True)
class EngineStats:
    """Counters of an engine since its start, and what it holds now.

    Attributes:
        rows: answered.
        batches: run; rows / batches is how full they were.
        queued_rows: waiting now.
        queued_tokens: waiting now.
        tokenised_rows: rows that were given to `submit`.
        rejected: refusals by the error's kind.
        queue_s: sum of the seconds that answered rows waited.
        queue_counts: how many rows waited how long, by the buckets of `Durations`; empty: nobody counted.
        run_s: sum of the seconds of all runs.
        run_tokens: tokens of the rows that were answered.
        padded_tokens: rows x padded length of all runs; run_tokens / padded_tokens says how little was padded.
        resident: customers in the table.
        loads: versions of customers that were brought into the table.
        evictions: customers that made room there for others.
        draining: no new request is taken.
        last_run_s: when the last run ended, in seconds of the Unix epoch; 0: there was none.
        running: number of the run that is under way, from 1 on; 0: nothing runs.
    """

    rows: int = 0
    batches: int = 0
    queued_rows: int = 0
    queued_tokens: int = 0
    tokenised_rows: int = 0
    rejected: tuple[tuple[str, int], ...] = ()
    queue_s: float = 0.0
    queue_counts: tuple[int, ...] = ()
    run_s: float = 0.0
    run_tokens: int = 0
    padded_tokens: int = 0
    resident: int = 0
    loads: int = 0
    evictions: int = 0
    draining: bool = False
    last_run_s: float = 0.0
    running: int = 0

    def __add__(self, other: "EngineStats") -> "EngineStats":
        """Those of two engines together; one that drains is enough."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in (*COUNTERS, *GAUGES)}
        return EngineStats(
            rejected=tuple(sorted((Counter(dict(self.rejected)) + Counter(dict(other.rejected))).items())),
            queue_counts=tuple(a + b for a, b in zip_longest(self.queue_counts, other.queue_counts, fillvalue=0)),
            draining=self.draining or other.draining,
            last_run_s=max(self.last_run_s, other.last_run_s),
            running=max(self.running, other.running),
            **sums,
        )

    def since(self, before: "EngineStats") -> "EngineStats":
        """What was counted after `before`, and what the engine holds now. An engine that was started anew in between
        has counted from 0, and nothing is less than that."""
        counted = {name: max(0, getattr(self, name) - getattr(before, name)) for name in COUNTERS}
        pairs = zip_longest(self.queue_counts, before.queue_counts, fillvalue=0)
        return replace(self, rejected=(), queue_counts=tuple(max(0, a - b) for a, b in pairs), **counted)

    def ended(self) -> "EngineStats":
        """What an engine counted that has ended and so holds nothing."""
        return replace(self, draining=False, queued_rows=0, queued_tokens=0, resident=0, running=0)


COUNTERS = (
    "rows",
    "batches",
    "tokenised_rows",
    "queue_s",
    "run_s",
    "run_tokens",
    "padded_tokens",
    "loads",
    "evictions",
)
"""Numbers of `EngineStats` that only grow."""

GAUGES = ("queued_rows", "queued_tokens", "resident")
"""Numbers of what an engine holds."""


def sum_of(stats: Sequence[EngineStats]) -> EngineStats:
    """Counters of several engines together; zeros of none."""
    return sum(stats, EngineStats())


class Ticket(Protocol):
    """A request's reserved place in the queue. Give it to `submit`, or `release` it.

    Attributes:
        load: what it was asked for.
        pending: None: the place is reserved. An engine in another process reserves it when this is done; it raises
            what `admit` raises, and until then nothing may be given to `submit`.
    """

    load: Load

    @property
    def pending(self) -> Awaitable[None] | None:
        """What to await."""


class Engine(Protocol):
    """Answers rows of any customers in batches. Safe for many threads and for an event loop: nothing here waits.

    Attributes:
        manifest: of the bundle that is served.
    """

    manifest: Manifest

    def check_room(self) -> None:
        """Refuse what comes where there is no room for anything, before it is read. An engine in another process, which
        is asked by `admit`, refuses nothing here.

        Raises:
            OverloadedError: the queue is full, or takes too long.
        """

    def admit(self, load: Load, customers: Sequence[str | None], deadline_s: float | None = None) -> Ticket:
        """Reserve room for a request, before it is tokenised.

        Args:
            load: the most that it may take.
            customers: whose rows they are, one for each row.
            deadline_s: a time of `time.monotonic` after which nobody waits for the answer.

        Raises:
            OverloadedError: the queue, or a customer's share of it, is full.
            QuotaError: a customer has used up its rows.
            DrainingError: the engine ends or does not answer yet.
            TooLargeError: the request would not fit an empty queue.
            DeadlineError: the deadline has passed.
        """

    def release(self, ticket: Ticket) -> None:
        """Give a reserved place back, such as of texts that could not be tokenised. Twice is no error."""

    def submit(self, ticket: Ticket, rows: Sequence[Row]) -> "Future[list[RowAnswer]]":
        """Queue rows; the place that was reserved becomes as large as they are.

        Returns:
            Done when every row is answered, in the order of `rows`; or it raises the first `QrloraError` of a row:
            `UnknownCustomerError`, `DeadlineError`, `MalformedInputError` and so on. A request that is cancelled
            is not run where it still waits.
        """

    def stats(self) -> EngineStats:
        """Counters of now."""

    def drain(self, timeout_s: float) -> bool:
        """Take no new request and wait for those that are queued; whether all were answered. This one waits."""

    def close(self) -> None:
        """End. What still waits is refused by a `DrainingError`."""
