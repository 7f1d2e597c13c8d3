"""Percentiles of counted durations beside numpy's of the durations themselves."""

import numpy as np
import pytest

from qrlora_deploy.serving.engine.durations import BUCKETS, ERROR, GROWTH, LEAST_S, Durations, bucket_of, percentile

RANDOM = np.random.default_rng(5)

SAMPLES = {
    "one": np.array([0.0123]),
    "alike": np.full(1000, 0.25),
    "two": np.array([0.001, 1.0]),
    "log-normal": RANDOM.lognormal(-4, 1.2, 20_000),
    "uniform": RANDOM.uniform(2e-5, 3.0, 5_000),
    "two humps": np.concatenate([RANDOM.normal(0.004, 0.0003, 9_900), RANDOM.normal(2.0, 0.1, 100)]),
    "exponential": RANDOM.exponential(0.05, 12_345) + LEAST_S,
}


def counted(seconds: np.ndarray) -> Durations:
    found = Durations()
    for value in seconds:
        found.add(float(value))
    return found


@pytest.mark.parametrize("percent", [0.1, 25, 50, 90, 99, 99.9, 100])
@pytest.mark.parametrize("name", SAMPLES)
def test_percentiles_are_numpys_within_the_stated_error(name: str, percent: float) -> None:
    expected = np.percentile(SAMPLES[name], percent, method="inverted_cdf")
    assert percentile(counted(SAMPLES[name]).counts, percent) == pytest.approx(expected, rel=ERROR * 1.0001)


def test_counts_of_two_processes_and_of_a_part_of_the_time_are_sums_and_differences() -> None:
    early, late = SAMPLES["log-normal"], SAMPLES["two humps"]
    one = counted(early)
    before = np.array(one.counts)
    for value in late:
        one.add(float(value))
    assert list(np.array(one.counts) - before) == counted(late).counts
    both = np.array(counted(early).counts) + np.array(counted(late).counts)
    assert list(both) == one.counts
    expected = np.percentile(np.concatenate([early, late]), 99, method="inverted_cdf")
    assert percentile(both, 99) == pytest.approx(expected, rel=ERROR * 1.0001)


def test_whatever_comes_has_a_bucket() -> None:
    for seconds in (-1.0, 0.0, 1e-12, LEAST_S):
        assert bucket_of(seconds) == 0
    assert bucket_of(LEAST_S * 1.001) == 1
    assert bucket_of(120.0) < BUCKETS - 1 == bucket_of(1e9)
    # Neighbours in size are in the same bucket or in the next one.
    steps = np.diff([bucket_of(LEAST_S * GROWTH ** (number / 7)) for number in range(7 * BUCKETS)])
    assert set(steps) == {0, 1}


def test_nothing_has_no_percentile() -> None:
    assert percentile((), 50) == percentile(Durations().counts, 99) == 0.0


def test_several_at_once_count_as_so_many() -> None:
    one, other = Durations(), Durations()
    one.add(0.5, times=3)
    for _ in range(3):
        other.add(0.5)
    assert one.counts == other.counts
