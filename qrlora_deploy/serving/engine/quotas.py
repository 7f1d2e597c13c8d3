"""How many rows a second a customer may ask: a bucket of tokens for each, filled as time goes by."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qrlora_deploy.errors import InputError
from qrlora_deploy.serving.refusals import QuotaError, TooLargeError

SWEEP = 4096
"""Buckets, after which those that are full again are forgotten: names may come from anybody."""


@dataclass(slots=True)
class _Bucket:
    """Rows that may be asked at `since_s`."""

    rows: float
    since_s: float


class Quotas:
    """Rows a second by customer. For one thread at a time.

    A customer that was silent for a while may ask what it did not use, up to its burst, and at least one row.

    Args:
        rows_s: rows a second by customer.
        default: of every other customer; None: as many as it likes.
        bursts: rows that may come at once, by customer.
        burst_s: of every other customer, in seconds of its rows.
        clock: seconds, as `time.monotonic`.

    Raises:
        InputError: a number is not positive.
    """

    def __init__(
        self,
        rows_s: Mapping[str, float] | None = None,
        default: float | None = None,
        bursts: Mapping[str, float] | None = None,
        burst_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst_s, self._clock = burst_s, clock
        self._buckets: dict[str, _Bucket] = {}
        self._sweep_at = SWEEP
        if not burst_s > 0:
            raise InputError(f"the burst of quotas must be positive, not {burst_s} seconds")
        self.change(rows_s or {}, default, bursts)

    def change(
        self, rows_s: Mapping[str, float], default: float | None = None, bursts: Mapping[str, float] | None = None
    ) -> None:
        """Other numbers from now on; what a customer has used stays used. From any thread.

        Raises:
            InputError: a number is not positive; nothing changes.
        """
        for customer, rate in [*rows_s.items(), ("any other", 1.0 if default is None else default)]:
            if not rate > 0:
                raise InputError(f"the quota of customer {customer!r} must be positive, not {rate} rows a second")
        self._bursts = dict(bursts or {})
        self._rows_s, self._default = dict(rows_s), default

    def take(self, rows: Mapping[str | None, int]) -> None:
        """Use rows of each customer's quota, or of none. The base has no quota.

        Raises:
            QuotaError: a customer has too few left; it says when there will be enough.
            TooLargeError: it never has so many.
        """
        now = self._clock()
        taken = []
        for customer, count in rows.items():
            rate = None if customer is None else self._rows_s.get(customer, self._default)
            if customer is not None and rate is not None:
                taken.append((self._checked(customer, count, rate, now), count))
        for bucket, count in taken:
            bucket.rows -= count
        if len(self._buckets) > self._sweep_at:
            self._forget_full(now)

    def _checked(self, customer: str, count: int, rate: float, now: float) -> _Bucket:
        """The bucket of a customer, filled up to now, which holds so many rows."""
        most = self._most(customer, rate)
        if count > most:
            raise TooLargeError(
                f"the request has {count} rows of a customer who may ask {most:g} at once; send it in parts"
            )
        bucket = self._buckets.setdefault(customer, _Bucket(most, now))
        bucket.rows = min(most, bucket.rows + (now - bucket.since_s) * rate)
        bucket.since_s = now
        if bucket.rows < count:
            raise QuotaError(
                f"the customer has used up its {rate:g} rows a second; try again later", (count - bucket.rows) / rate
            )
        return bucket

    def _most(self, customer: str, rate: float) -> float:
        return max(1.0, self._bursts.get(customer, rate * self._burst_s))

    def _forget_full(self, now: float) -> None:
        """Forget the buckets that are full: a new one is too."""
        for customer, bucket in list(self._buckets.items()):
            rate = self._rows_s.get(customer, self._default)
            if rate is None or bucket.rows + (now - bucket.since_s) * rate >= self._most(customer, rate):
                del self._buckets[customer]
        self._sweep_at = max(SWEEP, 2 * len(self._buckets))
