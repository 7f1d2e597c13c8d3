"""What happened between two moments of a server, in numbers that a person reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qrlora_deploy.serving.engine.durations import percentile
from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.live.totals import RequestTotals

Numbers = dict[str, float | None]

DIGITS = 6
SHORTEST_S = 1e-3


@dataclass(frozen=True)
class Moment:
    """What had been counted at a time.

    Attributes:
        time_s: of `time.monotonic`.
        requests: of the fronts.
        engines: by model.
    """

    time_s: float
    requests: RequestTotals
    engines: Mapping[str, EngineStats]


@dataclass(frozen=True)
class Span:
    """What happened between two moments.

    Attributes:
        seconds: from one to the other.
        requests: counted meanwhile.
        engines: counted meanwhile, by model.
    """

    seconds: float
    requests: RequestTotals
    engines: Mapping[str, EngineStats]

    @classmethod
    def between(cls, before: Moment, after: Moment) -> "Span":
        """Of two moments; a model that came in between counts from its start."""
        engines = {name: now.since(before.engines.get(name, EngineStats())) for name, now in after.engines.items()}
        seconds = max(SHORTEST_S, after.time_s - before.time_s)
        return cls(seconds, after.requests.since(before.requests), engines)

    def numbers(self) -> Numbers:
        """Numbers of all together; None: nothing happened that would have one.

        Returns:
            requests_s, refused_s: a second, answered well and not.
            p50_ms, p99_ms: of the requests that were answered well, from arrival to answer.
            queue_p50_ms, queue_p99_ms: that rows waited for their run.
            And what `engine_numbers` says of all models.
        """
        requests, together = self.requests, sum(self.engines.values(), EngineStats())
        return {
            "requests_s": _short(requests.answered / self.seconds),
            "refused_s": _short(sum(requests.refused.values()) / self.seconds),
            "p50_ms": _milliseconds(requests.seconds, 50),
            "p99_ms": _milliseconds(requests.seconds, 99),
            "queue_p50_ms": _milliseconds(together.queue_counts, 50),
            "queue_p99_ms": _milliseconds(together.queue_counts, 99),
            **engine_numbers(together, self.seconds),
        }

    def model_numbers(self) -> dict[str, Numbers]:
        """The numbers of each model's engine."""
        return {name: engine_numbers(stats, self.seconds) for name, stats in self.engines.items()}


def engine_numbers(stats: EngineStats, seconds: float) -> Numbers:
    """Numbers of an engine's counters in so many seconds.

    Returns:
        rows_s: a second.
        rows_a_batch: how full runs were.
        text_share: of the tokens that were computed, how many were no padding, 0 to 1.
        busy: share of the time in which a run was under way, 0 to 1; of several engines the sum.
        queued_rows, resident: now.
        loads, evictions: of customers in the table, in this time.
    """
    return {
        "rows_s": _short(stats.rows / seconds),
        "rows_a_batch": _short(stats.rows / stats.batches) if stats.batches else None,
        "text_share": _short(stats.run_tokens / stats.padded_tokens) if stats.padded_tokens else None,
        "busy": _short(stats.run_s / seconds),
        "queued_rows": stats.queued_rows,
        "resident": stats.resident,
        "loads": stats.loads,
        "evictions": stats.evictions,
    }


def _milliseconds(counts: Any, percent: float) -> float | None:
    seconds = percentile(counts, percent)
    return _short(seconds * 1000) if seconds else None


def _short(value: float) -> float:
    return round(value, DIGITS)
