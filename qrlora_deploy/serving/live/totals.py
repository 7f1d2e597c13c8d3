"""What fronts count of requests since the start of their process; totals of several processes are added."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qrlora_deploy.serving.engine.durations import BUCKETS, Durations


def _none() -> np.ndarray:
    return np.zeros(BUCKETS, dtype=np.int64)


@dataclass(frozen=True)
class RequestTotals:
    """What fronts have counted of the requests that ask a model.

    Attributes:
        answered: requests that were answered well.
        rows: of those.
        refused: requests that were not, by `reason_of` the error.
        seconds: int64 `[BUCKETS]`, how long those that were answered well took, by the buckets of `Durations`.
    """

    answered: int = 0
    rows: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    seconds: np.ndarray = field(default_factory=_none)

    def since(self, before: "RequestTotals") -> "RequestTotals":
        """What was counted after `before`. A front that was started anew in between has counted from 0."""
        refused = {name: count - before.refused.get(name, 0) for name, count in self.refused.items()}
        return RequestTotals(
            max(0, self.answered - before.answered),
            max(0, self.rows - before.rows),
            {name: count for name, count in refused.items() if count > 0},
            np.maximum(self.seconds - before.seconds, 0),
        )

    def __add__(self, other: "RequestTotals") -> "RequestTotals":
        """Those of both."""
        refused = dict(Counter(self.refused) + Counter(other.refused))
        return RequestTotals(
            self.answered + other.answered, self.rows + other.rows, refused, self.seconds + other.seconds
        )


class RequestCounts:
    """Counts the requests of a process's fronts, HTTP and gRPC. For one event loop; a request takes less than 1 us."""

    def __init__(self) -> None:
        self._answered = self._rows = 0
        self._refused: Counter[str] = Counter()
        self._seconds = Durations()

    def count(self, seconds: float, rows: int, reason: str = "") -> None:
        """Count a request.

        Args:
            seconds: it took.
            rows: that it had.
            reason: why it was not answered; empty: it was.
        """
        if reason:
            self._refused[reason] += 1
            return
        self._answered += 1
        self._rows += rows
        self._seconds.add(seconds)

    def totals(self) -> RequestTotals:
        """All until now."""
        seconds = np.array(self._seconds.counts, dtype=np.int64)
        return RequestTotals(self._answered, self._rows, dict(self._refused), seconds)
