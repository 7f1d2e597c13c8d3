"""How fast an engine is, measured as it runs."""

import time
from collections.abc import Callable

from qrlora_deploy.serving.engine.run_time import RunTime

WEIGHT = 0.2
"""Of the newest run in the mean."""

LONGEST_S, SHORTEST_S = 60.0, 0.05
"""Bounds of what a client is told to wait."""

UNKNOWN_S = 1.0
"""What a client is told to wait before anything has run."""

FIRST_TOKENS, LEAST_TOKENS, WINDOW_BATCHES = 2048, 512, 4
"""Tokens that are taken from the queue at once: before anything has run, and at least; and at most, in full batches."""


class Pace:
    """Rows and tokens a second, and how long what is here takes. For one thread at a time.

    Args:
        clock: seconds, as `time.monotonic`.

    Attributes:
        rows_s: rows a second; 0 before the first run.
        tokens_s: padded tokens a second; 0 before the first run.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.rows_s = 0.0
        self.tokens_s = 0.0
        self._rows = self._tokens = self._seconds = 0.0
        self._clock, self._run_time = clock, RunTime()
        self._running, self._begun_s = 0, 0.0
        self._request_tokens = 0.0

    def asked(self, tokens: int) -> None:
        """A request of so many tokens was let in."""
        self._request_tokens += WEIGHT * (tokens - self._request_tokens) if self._request_tokens else tokens

    def begins(self, tokens: int) -> None:
        """A run of so many tokens, without padding, begins."""
        self._running, self._begun_s = tokens, self._clock()

    def ran(self, rows: int, tokens: int, seconds: float) -> None:
        """A run of so many rows and padded tokens took so long: the one that has begun, if one had."""
        self._rows += WEIGHT * (rows - self._rows)
        self._tokens += WEIGHT * (tokens - self._tokens)
        self._seconds += WEIGHT * (max(seconds, 1e-6) - self._seconds)
        self.rows_s, self.tokens_s = self._rows / self._seconds, self._tokens / self._seconds
        if self._running:
            self._run_time.add(tokens, seconds)
            self._running = 0

    def ahead_s(self, tokens: int, max_batch_tokens: int) -> float:
        """Until all that is here will have run, the run under way included; 0 before anything has run.

        Args:
            tokens: of all that is here.
            max_batch_tokens: of a run.
        """
        running = min(self._running, tokens)
        waiting = tokens - running
        rest_s = self._run_time.of(running) - (self._clock() - self._begun_s) if running else 0.0
        runs = -(-waiting // max_batch_tokens)
        return max(0.0, rest_s) + self._run_time.of(waiting, runs)

    def padding_tokens(self, most: int) -> int | None:
        """As `RunTime.padding_tokens`."""
        return self._run_time.padding_tokens(most)

    def request_s(self) -> float:
        """What a request of the usual size takes where nothing else is here; 0 before anything has run."""
        return self._run_time.of(self._request_tokens)

    def wait_s(self, rows: float, tokens: float) -> float:
        """When so many rows and tokens will have been answered: what a client that is refused is told to wait."""
        if not self.tokens_s:
            return UNKNOWN_S
        return min(LONGEST_S, max(SHORTEST_S, rows / self.rows_s, tokens / self.tokens_s))

    def window_tokens(self, seconds: float, max_batch_tokens: int) -> int:
        """Tokens to take from the queue at once: what runs in so many seconds, and no more than a few full batches."""
        if not self.tokens_s:
            return min(FIRST_TOKENS, max_batch_tokens)
        return int(min(WINDOW_BATCHES * max_batch_tokens, max(LEAST_TOKENS, seconds * self.tokens_s)))
