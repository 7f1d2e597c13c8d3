"""Requests by route and code, as Prometheus wants them told; counting one is a few additions."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the histogram of requests."""

MAX_ROUTES = 64
OTHER = "other"
"""What routes beyond `MAX_ROUTES` are counted under: a label's values stay for as long as the process."""


class Counted:
    """Requests of a route that ended with one code.

    Attributes:
        requests: how many.
        rows: of those that were answered well.
        seconds: that they took together.
        within: how many took at most so long, and longer than the one before: by `SECONDS`, and beyond.
    """

    __slots__ = ("requests", "rows", "seconds", "within")

    def __init__(self) -> None:
        self.requests = self.rows = 0
        self.seconds = 0.0
        self.within = [0] * (len(SECONDS) + 1)


class RequestMetrics:
    """Counts requests; a collector of a registry. For one thread at a time: prometheus_client's own counters, which are
    safe for many, take five times as long."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, int], Counted] = {}
        self._routes: set[str] = set()

    def count(self, route: str, code: int, seconds: float, rows: int) -> None:
        """Count a request, as `Metrics.observe`."""
        counted = self._counted.get((route, code))
        if counted is None:
            counted = self._new(route, code)
        counted.requests += 1
        counted.seconds += seconds
        counted.within[bisect_left(SECONDS, seconds)] += 1
        if code < 400:
            counted.rows += rows

    def _new(self, route: str, code: int) -> Counted:
        known = route if route in self._routes or len(self._routes) < MAX_ROUTES else OTHER
        self._routes.add(known)
        return self._counted.setdefault((known, code), Counted())

    def describe(self) -> Iterable[Metric]:
        """Nothing that registering would have to know."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The families, by route and code."""
        requests = CounterMetricFamily("qrlora_requests", "Requests that were answered.", labels=["route", "code"])
        for (route, code), counted in self._counted.items():
            requests.add_metric([route, str(code)], counted.requests)
        yield requests
        seconds = HistogramMetricFamily(
            "qrlora_request_seconds", "From a request's arrival to its answer.", labels=["route"]
        )
        rows = CounterMetricFamily("qrlora_request_rows", "Rows of requests that were answered well.", labels=["route"])
        for route in sorted(self._routes):
            found = [counted for (name, _), counted in self._counted.items() if name == route]
            seconds.add_metric([route], _buckets(found), sum(counted.seconds for counted in found))
            rows.add_metric([route], sum(counted.rows for counted in found))
        yield seconds
        yield rows


def _buckets(found: Iterable[Counted]) -> list[tuple[str, float]]:
    """How many took at most so long, by each end."""
    within = [sum(counts) for counts in zip(*(counted.within for counted in found), strict=True)]
    ends = [*map(str, SECONDS), "+Inf"]
    return [(end, sum(within[: number + 1])) for number, end in enumerate(ends)]
