"""From rows in fair order to batches: of similar length, so that little is padded, and within the bounds of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.requests import WaitingRow

PADDING_TOKENS = 256
"""Of a batch, before it is known what a run costs beside its tokens."""


@dataclass(frozen=True)
class Shapes:
    """What a run of some rows is padded to.

    Attributes:
        max_batch_tokens: rows x length at most.
        max_padding_tokens: see `Limits`.
        buckets: shapes of the session; None: it runs what comes.
    """

    max_batch_tokens: int
    max_padding_tokens: int
    buckets: Buckets | None = None

    @classmethod
    def of(cls, limits: Limits, buckets: Buckets | None) -> "Shapes":
        """The shapes within an engine's limits."""
        padding = PADDING_TOKENS if limits.max_padding_tokens is None else limits.max_padding_tokens
        return cls(limits.max_batch_tokens, padding, buckets)

    def with_padding(self, tokens: int) -> "Shapes":
        """The same with another bound of padding."""
        return self if tokens == self.max_padding_tokens else replace(self, max_padding_tokens=tokens)

    def length(self, tokens: int) -> int:
        """What a row of so many tokens is padded to, by itself."""
        fitting = self.buckets.fit(1, tokens) if self.buckets else None
        return tokens if fitting is None else fitting[1]

    def rows(self, count: int, length: int) -> int:
        """What so many rows of a padded length are padded to."""
        fitting = self.buckets.fit(count, length) if self.buckets else None
        return count if fitting is None else fitting[0]

    def most_rows(self, length: int) -> int:
        """Rows of a padded length in one run, at most."""
        most = max(1, self.max_batch_tokens // length)
        if self.buckets is None or self.buckets.fit(1, length) is None:
            return most
        return max((size for size in self.buckets.batches if size <= most), default=1)

    def without_spare_rows(self, count: int, length: int) -> int:
        """How many of so many rows to run together, where all of them would leave too much of a bucket empty."""
        padding = (self.rows(count, length) - count) * length
        if self.buckets is None or padding <= self.max_padding_tokens:
            return count
        return max((size for size in self.buckets.batches if size <= count), default=count)


def cut(rows: Sequence[WaitingRow], shapes: Shapes) -> list[list[WaitingRow]]:
    """Every row in one batch, longest rows together; the batch of the first row comes first.

    Args:
        rows: in the order in which they should be answered.
    """
    if len(rows) == 1:
        return [list(rows)]
    place = {id(row): number for number, row in enumerate(rows)}
    batches = []
    # The longest first: what follows a row in its batch is padded up to it.
    left = sorted(rows, key=lambda row: row.length, reverse=True)
    start = 0
    while start < len(left):
        count = _first_batch(left, start, shapes)
        batches.append(left[start : start + count])
        start += count
    return sorted(batches, key=lambda batch: min(place[id(row)] for row in batch))


def _first_batch(rows: Sequence[WaitingRow], start: int, shapes: Shapes) -> int:
    """How many of the rows from `start` on, longest first, run together."""
    length = shapes.length(rows[start].length)
    most = min(shapes.most_rows(length), len(rows) - start)
    count, padding = 1, 0
    while count < most:
        padding += length - shapes.length(rows[start + count].length)
        if padding > shapes.max_padding_tokens:
            break
        count += 1
    return shapes.without_spare_rows(count, length)
