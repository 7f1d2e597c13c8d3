"""How long things took: counts by buckets of one scale, which are added, subtracted and asked for percentiles."""

import math
from collections.abc import Sequence

import numpy as np

LEAST_S = 1e-5
"""Upper end of the first bucket."""

GROWTH = 1.05
"""Each bucket ends so many times as far up as the one before it."""

BUCKETS = 340
"""The last one holds everything above about two minutes."""

ERROR = math.sqrt(GROWTH) - 1
"""Of a percentile between `LEAST_S` and two minutes, at most, as a share of it: 2.5 %."""

_STEPS = 1 / math.log(GROWTH)


class Durations:
    """A histogram of durations since the start of a process. For one thread at a time; adding takes some 0.2 us.

    Attributes:
        counts: how many there were in each bucket; they only grow, so that the difference between two moments is the
            histogram of what came in between, and the sum over processes that of all.
    """

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a duration, or several that are alike."""
        self.counts[bucket_of(seconds)] += times


def bucket_of(seconds: float) -> int:
    """The number of a duration's bucket."""
    if seconds <= LEAST_S:
        return 0
    return min(BUCKETS - 1, math.ceil(math.log(seconds / LEAST_S) * _STEPS))


def percentile(counts: Sequence[int] | np.ndarray, percent: float) -> float:
    """The smallest duration that at least so many of the counted ones do not exceed.

    Args:
        counts: of the buckets.
        percent: above 0, up to 100.

    Returns:
        Seconds, within `ERROR` of numpy's percentile by the method "inverted_cdf"; 0.0 where nothing was counted.
    """
    upto = np.cumsum(np.asarray(counts, dtype=np.int64))
    if not len(upto) or not upto[-1]:
        return 0.0
    # A hair less, for 99 % of 100 is 99 and not 99.00000000000001.
    rank = max(1, math.ceil(percent / 100 * int(upto[-1]) - 1e-9))
    bucket = int(np.searchsorted(upto, rank))
    return LEAST_S * GROWTH ** (bucket - 0.5)
