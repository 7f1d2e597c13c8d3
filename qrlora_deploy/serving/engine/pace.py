"""How fast an engine is, measured as it runs."""

WEIGHT = 0.2
"""Of the newest run in the mean."""

LONGEST_S, SHORTEST_S = 60.0, 0.05
"""Bounds of what a client is told to wait."""

UNKNOWN_S = 1.0
"""What a client is told to wait before anything has run."""

FIRST_TOKENS, LEAST_TOKENS, WINDOW_BATCHES = 2048, 512, 4
"""Tokens that are taken from the queue at once: before anything has run, and at least; and at most, in full batches."""


class Pace:
    """Rows and tokens a second. For one thread at a time.

    Attributes:
        rows_s: rows a second; 0 before the first run.
        tokens_s: padded tokens a second; 0 before the first run.
    """

    def __init__(self) -> None:
        self.rows_s = 0.0
        self.tokens_s = 0.0
        self._rows = self._tokens = self._seconds = 0.0

    def ran(self, rows: int, tokens: int, seconds: float) -> None:
        """A run of so many rows and padded tokens took so long."""
        self._rows += WEIGHT * (rows - self._rows)
        self._tokens += WEIGHT * (tokens - self._tokens)
        self._seconds += WEIGHT * (max(seconds, 1e-6) - self._seconds)
        self.rows_s, self.tokens_s = self._rows / self._seconds, self._tokens / self._seconds

    def run_s(self, rows: float) -> float:
        """How long so many rows take; 0 before anything has run."""
        return rows / self.rows_s if self.rows_s else 0.0

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
