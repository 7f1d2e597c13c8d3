"""Metrics: what a scrape says is what the engines counted and what was observed."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="needs the extra serve")

from prometheus_client.parser import text_string_to_metric_families

from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.request_metrics import MAX_ROUTES

STATS = EngineStats(
    rows=120,
    batches=10,
    queued_rows=7,
    queued_tokens=70,
    tokenised_rows=130,
    rejected=(("overloaded", 3), ("quota", 2)),
    queue_s=1.5,
    run_s=0.5,
    resident=4,
    loads=6,
    evictions=2,
    draining=True,
)


@dataclass
class Counted:
    """A model with counters that a test sets."""

    name: str
    counters: EngineStats

    @property
    def engine(self) -> Any:
        return SimpleNamespace(stats=lambda: self.counters)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a scrape by name and labels, as Prometheus' own parser reads them."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {(it.name, tuple(sorted(it.labels.items()))): it.value for family in families for it in family.samples}


def test_a_scrape_says_what_the_engines_count() -> None:
    first, second = Counted("bert", STATS), Counted("mpnet", EngineStats(rows=1, batches=1))
    metrics = Metrics([first, second])
    found = samples(metrics)
    expected = {
        "qrlora_rows_total": 120,
        "qrlora_batches_total": 10,
        "qrlora_tokenised_rows_total": 130,
        "qrlora_queue_rows": 7,
        "qrlora_queue_tokens": 70,
        "qrlora_table_resident": 4,
        "qrlora_table_loads_total": 6,
        "qrlora_table_evictions_total": 2,
        "qrlora_draining": 1,
        "qrlora_queue_seconds_count": 120,
        "qrlora_queue_seconds_sum": 1.5,
        "qrlora_run_seconds_count": 10,
        "qrlora_run_seconds_sum": 0.5,
    }
    assert {name: found[name, (("model", "bert"),)] for name in expected} == expected
    rejected = {key[1]: value for key, value in found.items() if key[0] == "qrlora_rejected_total"}
    assert rejected == {
        (("model", "bert"), ("reason", "overloaded")): 3,
        (("model", "bert"), ("reason", "quota")): 2,
    }
    assert found["qrlora_rows_total", (("model", "mpnet"),)] == 1
    first.counters = replace(STATS, rows=121, draining=False)
    again = samples(metrics)
    assert again["qrlora_rows_total", (("model", "bert"),)] == 121
    assert again["qrlora_draining", (("model", "bert"),)] == 0


def test_requests_are_counted_by_route_and_code() -> None:
    metrics = Metrics([])
    for code, rows in ((200, 4), (200, 1), (429, 9)):
        metrics.observe("/v1/classify", code, 0.02, rows)
    found = samples(metrics)
    assert found["qrlora_requests_total", (("code", "200"), ("route", "/v1/classify"))] == 2
    assert found["qrlora_requests_total", (("code", "429"), ("route", "/v1/classify"))] == 1
    assert found["qrlora_request_rows_total", (("route", "/v1/classify"),)] == 5
    assert found["qrlora_request_seconds_count", (("route", "/v1/classify"),)] == 3
    assert found["qrlora_request_seconds_bucket", (("le", "0.01"), ("route", "/v1/classify"))] == 0
    assert found["qrlora_request_seconds_bucket", (("le", "0.025"), ("route", "/v1/classify"))] == 3


def test_customers_are_a_label_for_those_on_the_list_alone() -> None:
    metrics = Metrics([], customers=["acme"])
    metrics.observe("/v1/classify", 200, 0.1, 4, ["acme", "bolt", None, "acme"])
    metrics.observe("/v1/classify", 429, 0.1, 1, ["acme"])
    found = {key: value for key, value in samples(metrics).items() if key[0].startswith("qrlora_customer_rows_total")}
    assert found == {("qrlora_customer_rows_total", (("customer", "acme"),)): 2}
    plain = Metrics([])
    plain.observe("/v1/classify", 200, 0.1, 1, ["acme"])
    assert b"acme" not in plain.text() and b"bolt" not in metrics.text()


def test_routes_cannot_fill_the_memory() -> None:
    metrics = Metrics([])
    for number in range(3 * MAX_ROUTES):
        metrics.observe(f"/{number}", 404, 0.0, 0)
    routes = {dict(labels)["route"] for name, labels in samples(metrics) if name == "qrlora_requests_total"}
    assert len(routes) == MAX_ROUTES + 1 and "other" in routes


def test_two_servers_in_a_process_count_apart() -> None:
    first, second = Metrics([]), Metrics([])
    first.observe("/v1/classify", 200, 0.1, 1)
    assert b"/v1/classify" not in second.text()
    assert samples(first)["process_resident_memory_bytes", ()] > 0
