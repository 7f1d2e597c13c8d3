"""The window of the last minutes: what it says is what happened in it, over processes and restarts."""

from dataclasses import fields, replace

import numpy as np
import pytest

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.engine.durations import ERROR, Durations
from qrlora_deploy.serving.engine.protocol import COUNTERS, GAUGES, EngineStats
from qrlora_deploy.serving.live.totals import RequestCounts, RequestTotals
from qrlora_deploy.serving.live.window import RECENT_STEPS, STEP_S, STEPS, Window


class Server:
    """A server that a test plays, and its window."""

    def __init__(self) -> None:
        self.now_s, self.counts, self.waits = 1000.0, RequestCounts(), Durations()
        self.engine = EngineStats()
        self.broken = False
        self.window = Window(self.counts.totals, self._engines, lambda: self.now_s)
        self.window.look()

    def _engines(self) -> dict[str, EngineStats]:
        if self.broken:
            raise QrloraError("the engine is not there")
        return {"tiny": self.engine}

    def run(self, rows: int, batches: int, waited_s: float = 0.0, **more: float) -> None:
        """The engine answers some rows."""
        if waited_s:
            self.waits.add(waited_s, rows)
        self.engine = self.engine + EngineStats(rows=rows, batches=batches, **more)  # type: ignore[arg-type]
        self.engine = EngineStats(**{**vars(self.engine), "queue_counts": tuple(self.waits.counts)})

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.now_s += STEP_S
            self.window.look()


def test_the_numbers_of_a_step() -> None:
    server = Server()
    for _ in range(20):
        server.counts.count(0.010, 3)
    for _ in range(4):
        server.counts.count(0.001, 1, "overloaded")
    server.run(60, 6, 0.004, run_s=0.5, run_tokens=900, padded_tokens=1000, loads=7, evictions=2, resident=12)
    server.step()
    found = server.window.numbers()
    expected = {
        "requests_s": 20 / STEP_S,
        "refused_s": 4 / STEP_S,
        "rows_s": 60 / STEP_S,
        "rows_a_batch": 10,
        "text_share": 0.9,
        "busy": 0.5 / STEP_S,
        "loads": 7,
        "evictions": 2,
        "resident": 12,
        "queued_rows": 0,
    }
    assert {name: found["now"][name] for name in expected} == expected
    for name, milliseconds in (("p50_ms", 10), ("p99_ms", 10), ("queue_p50_ms", 4), ("queue_p99_ms", 4)):
        assert found["now"][name] == pytest.approx(milliseconds, rel=ERROR * 1.0001)
    assert found["refused"] == {"overloaded": 4} and found["seconds"] == STEP_S
    assert found["models"]["tiny"]["rows_s"] == 30 and set(found["models"]) == {"tiny"}
    assert {name: values[-1] for name, values in found["history"].items()} == {"age_s": 0.0, **found["now"]}
    server.step()
    quiet = server.window.numbers()["history"]
    assert quiet["requests_s"][-2:] == [10, 0] and quiet["p99_ms"][-1] is None and quiet["rows_a_batch"][-1] is None
    assert quiet["loads"][-2:] == [7, 0] and quiet["resident"][-2:] == [12, 12] and quiet["age_s"] == [2.0, 0.0]


def test_percentiles_are_of_the_last_minute_alone() -> None:
    server, random = Server(), np.random.default_rng(1)
    server.step()
    for _ in range(5000):
        server.counts.count(9.0, 1)
    server.step(RECENT_STEPS + 1)
    recent = random.lognormal(-4, 0.8, 5000)
    for number, seconds in enumerate(recent):
        server.counts.count(seconds, 1)
        if number % 500 == 0:
            server.step()
    server.step()
    now = server.window.numbers()["now"]
    for name, percent in (("p50_ms", 50), ("p99_ms", 99)):
        expected = np.percentile(recent, percent, method="inverted_cdf") * 1000
        assert now[name] == pytest.approx(expected, rel=ERROR * 1.0001)


def test_five_minutes_are_kept_and_no_more() -> None:
    server = Server()
    for number in range(STEPS + 50):
        server.counts.count(0.001, number)
        server.step()
    found = server.window.numbers()
    assert {len(values) for values in found["history"].values()} == {STEPS}
    assert found["history"]["age_s"][0] == STEP_S * (STEPS - 1) and found["seconds"] == STEP_S * RECENT_STEPS
    assert len(server.window._recent) == RECENT_STEPS + 1


def test_looks_close_together_are_one() -> None:
    server = Server()
    for _ in range(10):
        server.now_s += STEP_S / 10
        server.window.numbers()
    assert len(server.window.numbers()["history"]["age_s"]) == 2


def test_what_is_there_before_anything_happened() -> None:
    found = Server().window.numbers()
    assert found == {"step_s": STEP_S, "seconds": 0.0, "now": {}, "refused": {}, "models": {}, "history": {}}


def test_an_engine_that_starts_again_counts_from_nothing() -> None:
    server = Server()
    server.run(1000, 10, 0.002, run_s=1.0)
    server.step()
    server.broken = True
    server.step(3)
    server.broken, server.engine, server.waits = False, EngineStats(), Durations()
    server.run(8, 2, 0.002)
    server.step()
    history = server.window.numbers()["history"]
    assert len(history["rows_s"]) == 2
    assert all(value is None or value >= 0 for values in history.values() for value in values)


def test_totals_of_processes_are_added() -> None:
    one, other, both = RequestCounts(), RequestCounts(), RequestCounts()
    for counts, seconds, rows, reason in (
        (one, 0.01, 2, ""),
        (one, 0.02, 1, "quota"),
        (other, 3.0, 4, ""),
        (other, 0.5, 1, "quota"),
        (other, 0.5, 1, "deadline"),
    ):
        counts.count(seconds, rows, reason)
        both.count(seconds, rows, reason)
    found, expected = one.totals() + other.totals(), both.totals()
    assert (found.answered, found.rows, found.refused) == (2, 6, {"quota": 2, "deadline": 1})
    assert (expected.answered, expected.rows, expected.refused) == (2, 6, {"quota": 2, "deadline": 1})
    np.testing.assert_array_equal(found.seconds, expected.seconds)
    np.testing.assert_array_equal((found + RequestTotals()).seconds, expected.seconds)


def test_counters_of_engines_are_added() -> None:
    one = EngineStats(1, 2, 3, 4, 5, (("quota", 1),), 0.5, (1, 2), 0.25, 6, 7, 8, 9, 10)
    other = EngineStats(10, 20, 30, 40, 50, (("quota", 2), ("slow", 1)), 1.0, (), 1.0, 60, 70, 80, 90, 100, True)
    found = one + other
    assert found == EngineStats(
        11, 22, 33, 44, 55, (("quota", 3), ("slow", 1)), 1.5, (1, 2), 1.25, 66, 77, 88, 99, 110, True
    )
    assert (found.since(one).rows, found.since(one).resident, found.since(one).queue_counts) == (10, 88, (0, 0))
    names = {it.name for it in fields(EngineStats)}
    assert set(COUNTERS) | set(GAUGES) | {"rejected", "queue_counts", "draining", "last_run_s", "running"} == names
    assert (replace(one, running=7) + other).running == 7 and replace(one, running=7).ended().running == 0
