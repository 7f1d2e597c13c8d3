"""What a text engine counts."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qrlora_deploy.serving.engine.durations import Durations
from qrlora_deploy.serving.engine.protocol import EngineStats

BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper ends of the histogram of the time to the first token; one more bucket holds what is above."""


@dataclass(frozen=True)
class WriterStats:
    """Counters of a text engine since its start, and what it holds now.

    Attributes:
        prompt_tokens: of the answers that have ended.
        reused_tokens: of these, those that were not read again.
        answer_tokens: written.
        cancelled: answers that ended before their end: nobody waited for them, or they failed.
        running: answers that have a place in the running batch now.
        first_token_s: sum of the seconds from the queue to the first token.
        first_token_counts: how many answers had it when, by `BOUNDS_S`.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    cancelled: int = 0
    running: int = 0
    first_token_s: float = 0.0
    first_token_counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)

    def __add__(self, other: "WriterStats") -> "WriterStats":
        """Those of two engines together."""
        sums = {
            it.name: getattr(self, it.name) + getattr(other, it.name)
            for it in fields(self)
            if it.name != "first_token_counts"
        }
        counts = zip(self.first_token_counts, other.first_token_counts, strict=True)
        return WriterStats(**sums, first_token_counts=tuple(one + two for one, two in counts))

    def ended(self) -> "WriterStats":
        """What an engine counted that has ended."""
        return replace(self, running=0)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "WriterStats":
        """From JSON.

        Raises:
            TypeError: it is none.
        """
        return cls(**{**record, "first_token_counts": tuple(record["first_token_counts"])})


@dataclass
class Counts:
    """Counters that grow. For one thread at a time.

    Attributes:
        answers: ended well.
        steps: done.
        step_s: what they took.
        last_step_s: when the last one ended, in seconds of the Unix epoch.
        queue_s: what the answers that were begun have waited.
        queued: how long each.
        written: all else.
    """

    answers: int = 0
    steps: int = 0
    step_s: float = 0.0
    last_step_s: float = 0.0
    queue_s: float = 0.0
    queued: Durations = field(default_factory=Durations)
    written: WriterStats = field(default_factory=WriterStats)

    def engine_stats(self) -> EngineStats:
        """What is counted here, as engines of rows count it."""
        return EngineStats(
            rows=self.answers,
            batches=self.steps,
            tokenised_rows=sum(self.queued.counts),
            queue_s=self.queue_s,
            queue_counts=tuple(self.queued.counts),
            run_s=self.step_s,
            run_tokens=self.written.answer_tokens,
            padded_tokens=self.written.answer_tokens,
            last_run_s=self.last_step_s,
        )

    def began(self, waited_s: float) -> None:
        """An answer has a place in the running batch."""
        self.queue_s += waited_s
        self.queued.add(waited_s)

    def stepped(self, seconds: float, now_s: float) -> None:
        """A token of every answer, and some of the prompts."""
        self.steps += 1
        self.step_s += seconds
        self.last_step_s = now_s

    def wrote(self, tokens: int) -> None:
        """Tokens of an answer."""
        self.written = replace(self.written, answer_tokens=self.written.answer_tokens + tokens)

    def first_token(self, seconds: float) -> None:
        """An answer has its first token."""
        counts = list(self.written.first_token_counts)
        counts[bisect_left(BOUNDS_S, seconds)] += 1
        total = self.written.first_token_s + seconds
        self.written = replace(self.written, first_token_s=total, first_token_counts=tuple(counts))

    def ended(self, prompt_tokens: int, reused_tokens: int, cancelled: bool) -> None:
        """An answer has ended."""
        was = self.written
        self.answers += not cancelled
        self.written = replace(
            was,
            prompt_tokens=was.prompt_tokens + prompt_tokens,
            reused_tokens=was.reused_tokens + reused_tokens,
            cancelled=was.cancelled + cancelled,
        )
