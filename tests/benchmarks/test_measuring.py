"""What every benchmark's record holds: percentiles that were seen, the machine, and turns of equal number."""

import random

import numpy as np
import pytest

from benchmarks.common import measuring
from benchmarks.common.measuring import environment, in_turn, summary
from qrlora_deploy.bench.report_parts import Environment


def test_a_percentile_is_a_sample_that_was_seen() -> None:
    samples = [count / 1000 for count in range(1, 201)]
    random.Random(0).shuffle(samples)
    # Of 1 to 200 ms, half are at most 100 ms, nine tenths at most 180 ms.
    assert summary(samples) == pytest.approx({"p50": 100.0, "p90": 180.0, "p95": 190.0, "p99": 198.0, "samples": 200})
    assert summary([2.0, 1.0], 1.0) == {"p50": 1.0, "p90": 2.0, "p95": 2.0, "p99": 2.0, "samples": 2}


def test_the_machine_is_recorded_as_bench_does() -> None:
    found = environment("cpu")
    assert (found.pop("device"), found.pop("tf32")) == ("cpu", False)
    assert Environment.model_validate(found).versions["numpy"] == np.__version__


def test_of_two_runs_of_a_turn_the_second_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called = [0.0], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def call(name: str, first: float, second: float) -> None:
        # The first run of a turn is slow.
        called.append(name)
        clock[0] += first if called.count(name) % 2 else second

    calls = {"a": lambda: call("a", 9.0, 1.0), "b": lambda: call("b", 8.0, 2.0)}
    samples = in_turn(calls, np.random.default_rng(0), lambda rounds: rounds < 20)
    assert samples == {"a": [1.0] * 20, "b": [2.0] * 20}
    # Each has two runs in a round, one after the other, and neither is always the first.
    rounds = ["".join(called[start : start + 4]) for start in range(0, 80, 4)]
    assert set(rounds) == {"aabb", "bbaa"}
