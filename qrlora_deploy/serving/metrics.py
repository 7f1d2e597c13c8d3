"""What Prometheus reads: counters of requests, and those of each model's engine at the moment of the scrape."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.process_collector import ProcessCollector

from qrlora_deploy.runtime.customers.objects.store import ObjectStoreStats
from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.generation.metrics import writer_metrics
from qrlora_deploy.serving.request_metrics import RequestMetrics
from qrlora_deploy.version import __version__

StoreStats = Callable[[], ObjectStoreStats]


class Counting(Protocol):
    """An engine, or several together, as far as its counters go."""

    def stats(self) -> EngineStats:
        """Counters of now."""


class Served(Protocol):
    """A model that is served: its name, and what answers."""

    @property
    def name(self) -> str:
        """In URLs, and the label `model`."""

    @property
    def engine(self) -> Counting:
        """Whose counters are read."""


class Metrics:
    """Metrics of a server, in a registry of its own. For one event loop.

    Args:
        models: asked anew at every scrape.
        customers: that are counted by name. Others are not told apart: every value of a label costs memory for as long
            as the process lives, and customers may be millions.
        stores: of models' customers, by the model's name: how each object store is doing. Read anew at every scrape.
    """

    def __init__(
        self, models: Iterable[Served], customers: Iterable[str] = (), stores: Mapping[str, StoreStats] | None = None
    ) -> None:
        self._customers = frozenset(customers)
        self.registry = registry = CollectorRegistry()
        self._requests = RequestMetrics()
        registry.register(self._requests)
        if self._customers:
            self._by_customer = Counter(
                "qrlora_customer_rows",
                "Rows that were answered, of the customers on the list.",
                ["customer"],
                registry=registry,
            )
        self.registry.register(_Engines(models))
        self.registry.register(_Stores({} if stores is None else stores))
        ProcessCollector(registry=self.registry)

    def observe(self, route: str, code: int, seconds: float, rows: int, customers: Sequence[str | None] = ()) -> None:
        """Count a request.

        Args:
            route: its pattern, such as `/v2/models/{model}/infer`; never the path itself, which a client chooses.
            code: of the HTTP answer.
            seconds: it took.
            rows: that it had.
            customers: of its rows, one for each.
        """
        self._requests.count(route, code, seconds, rows)
        if self._customers and code < 400:
            self._count(customers)

    def _count(self, customers: Sequence[str | None]) -> None:
        for name in customers:
            if name in self._customers:
                self._by_customer.labels(name).inc()

    async def scrape(self) -> bytes:
        """The same for who asks over a network."""
        return self.text()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format, UTF-8."""
        return generate_latest(self.registry)


COUNTERS = {
    "qrlora_rows": ("Rows that were answered; by qrlora_batches it is how full batches are.", "rows"),
    "qrlora_batches": ("Batches that were run.", "batches"),
    "qrlora_tokenised_rows": ("Rows that were tokenised; what is refused for load never is.", "tokenised_rows"),
    "qrlora_table_loads": ("Versions of customers that were brought into the table.", "loads"),
    "qrlora_table_evictions": ("Customers that made room for others in the table.", "evictions"),
}

GAUGES = {
    "qrlora_queue_rows": ("Rows that wait.", "queued_rows"),
    "qrlora_queue_tokens": ("Tokens of the rows that wait.", "queued_tokens"),
    "qrlora_table_resident": ("Customers in the table on the device.", "resident"),
    "qrlora_draining": ("1 while no new request is taken.", "draining"),
}

SUMMARIES = {
    "qrlora_queue_seconds": ("What rows waited.", "rows", "queue_s"),
    "qrlora_run_seconds": ("What batches took to run.", "batches", "run_s"),
}


class _Engines:
    """Reads the counters of the engines when it is asked: nothing is counted twice, and nothing between scrapes."""

    def __init__(self, models: Iterable[Served]) -> None:
        self._models = models

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask an engine that may not have started."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One family of metrics after the other, with the label `model`."""
        stats = {model.name: model.engine.stats() for model in self._models}
        yield from _simple(CounterMetricFamily, COUNTERS, stats)
        yield from _simple(GaugeMetricFamily, GAUGES, stats)
        for name, (text, count, total) in SUMMARIES.items():
            summary = SummaryMetricFamily(name, text, labels=["model"])
            for model, it in stats.items():
                summary.add_metric([model], getattr(it, count), getattr(it, total))
            yield summary
        rejected = CounterMetricFamily("qrlora_rejected", "Refusals, by their reason.", labels=["model", "reason"])
        for model, it in stats.items():
            for reason, times in it.rejected:
                rejected.add_metric([model, reason], times)
        yield rejected
        build = GaugeMetricFamily("qrlora_build_info", "1, with the version of the server.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        writers = {model.name: writer for model in self._models if (writer := getattr(model, "writer", None))}
        yield from writer_metrics({name: writer.written() for name, writer in writers.items()})


STORE_GAUGES = {
    "qrlora_store_up": ("1 while the object store of the customers answers.", "up"),
    "qrlora_store_customers": ("Customers that the last listing of the object store showed.", "customers"),
    "qrlora_store_listing_age_seconds": ("Since the last whole listing was begun.", "age_s"),
}

STORE_COUNTERS = {"qrlora_store_failures": ("Questions to the object store that failed.", "failures")}


class _Stores:
    """Asks how the object stores are doing, which asks no store anything."""

    def __init__(self, stores: Mapping[str, StoreStats]) -> None:
        self._stores = stores

    def describe(self) -> Iterable[Metric]:
        """Nothing, as of `_Engines`."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One family of metrics after the other, with the label `model`; none where there is no store."""
        if self._stores:
            stats = {model: ask() for model, ask in self._stores.items()}
            yield from _simple(GaugeMetricFamily, STORE_GAUGES, stats)
            yield from _simple(CounterMetricFamily, STORE_COUNTERS, stats)


def _simple(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    families: Mapping[str, tuple[str, str]],
    stats: Mapping[str, object],
) -> Iterator[Metric]:
    """Families of one number a model, each an attribute of its counters."""
    for name, (text, attribute) in families.items():
        family = kind(name, text, labels=["model"])
        for model, it in stats.items():
            family.add_metric([model], getattr(it, attribute))
        yield family
