"""Percentiles against scipy's, stability, and the calibration of the interval of a ratio."""

import math

import numpy as np
import pytest
from scipy import stats

from qrlora_deploy.bench.statistics import (
    PERCENTILES,
    block_length,
    needed_samples,
    percentile,
    quantile,
    ratio,
    ratio_in_rounds,
    stability,
    student_quantile,
)


def noise(random: np.random.Generator, count: int, memory: float) -> np.ndarray:
    """AR(1) with unit variance."""
    steps = random.normal(size=count) * math.sqrt(1 - memory**2)
    steps[0] /= math.sqrt(1 - memory**2)
    values = np.empty(count)
    level = 0.0
    for index, step in enumerate(steps):
        level = values[index] = memory * level + step
    return values


def two_identical(seed: int, count: int, memory: float, drift: float) -> tuple[np.ndarray, np.ndarray]:
    """Latencies of two equal subjects in the same rounds: spells and drift in common, noise of their own, outliers."""
    random = np.random.default_rng(seed)
    common = noise(random, count, memory) + drift * np.linspace(0, 1, count)
    both = [
        np.exp(0.03 * (common + noise(random, count, memory)))
        * (1 + (random.random(count) < 0.03) * random.exponential(0.5, count))
        for _ in range(2)
    ]
    return 5 * both[0], 5 * both[1]


@pytest.mark.parametrize("share", PERCENTILES.values())
def test_needed_samples_are_the_fewest_with_an_interval(share: float) -> None:
    count = needed_samples(share)
    tail = max(share, 1 - share)
    assert 1 - tail**count >= 0.975 > 1 - tail ** (count - 1)
    random = np.random.default_rng(0)
    assert percentile(random.normal(size=count - 1), share) is None
    found = percentile(random.normal(size=count), share)
    assert found is not None and found.low <= found.value <= found.high


@pytest.mark.parametrize(("share", "count"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368), (0.999, 3688)])
def test_needed_samples(share: float, count: int) -> None:
    assert needed_samples(share) == count


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_interval_of_a_percentile_holds_it(share: float) -> None:
    truth = stats.expon.ppf(share)
    held = 0
    for seed in range(400):
        found = percentile(np.random.default_rng(seed).exponential(size=500), share)
        assert found is not None
        held += found.low <= truth <= found.high
    # 95 % of 400 at least; exact intervals between samples hold a little more. 4 standard errors.
    assert held / 400 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400)


def test_a_percentile_is_a_sample() -> None:
    assert [quantile(np.arange(1.0, 101), share) for share in (0.5, 0.99, 0.999)] == [50.0, 99.0, 100.0]


def test_students_quantile_against_scipy() -> None:
    for freedom in (3, 5, 10, 100):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-2)


def test_stability() -> None:
    assert not stability([1.0, 1.0]).stable and stability([1.0, 1.0]).spread is None
    assert stability([9.0, 1.0, 1.05, 0.95]).stable
    assert not stability([1.0, 1.0, 1.3]).stable
    assert stability([2.0, 2.0, 2.0]).spread == 0.0


def test_blocks_are_as_long_as_the_dependence() -> None:
    random = np.random.default_rng(0)
    free = block_length(random.normal(size=1000))
    bound = block_length(noise(random, 1000, 0.95))
    assert free == 20 < 60 < bound <= 1000 // 6
    assert block_length(np.ones(100)) == 10
    assert block_length(np.arange(30.0)) == 5


@pytest.mark.parametrize(("memory", "drift"), [(0.0, 0.0), (0.5, 0.0), (0.8, 0.0), (0.5, 10.0)])
def test_identical_subjects_are_seldom_told_apart_and_a_tenth_is_seen(memory: float, drift: float) -> None:
    for judged in (lambda one, other: ratio(one, other, 0.5), ratio_in_rounds):
        claims = seen = 0
        for seed in range(40):
            samples, reference = two_identical(seed, 250, memory, drift)
            same, slower = judged(samples, reference), judged(1.1 * samples, reference)
            claims += not same.low <= 1 <= same.high
            seen += slower.low > 1
        # 2 of 40 are expected; 6 or more happen in 1.4 % of honest cases, and the seeds are fixed.
        assert claims <= 5
        assert seen == 40


def test_rounds_see_through_a_machine_that_is_shared() -> None:
    random = np.random.default_rng(0)
    # Other work halves the speed in spells of 20 rounds, for both alike; single runs miss it or meet it.
    spells = np.repeat(random.random(20) < 0.5, 20)
    both = [5 * (1 + np.where(random.random(400) < 0.1, ~spells, spells)) * random.normal(1, 0.02, 400) for _ in "ab"]
    found, medians = ratio_in_rounds(1.1 * both[0], both[1]), ratio(1.1 * both[0], both[1], 0.5)
    assert found is not None and medians is not None
    assert 1.02 < found.low <= 1.1 <= found.high
    assert found.high - found.low < (medians.high - medians.low) / 2


def test_the_interval_of_a_tail_is_honest_too() -> None:
    claims = 0
    for seed in range(30):
        same = ratio(*two_identical(seed, 500, 0.5, 0.0), 0.99)
        assert same is not None
        claims += not same.low <= 1 <= same.high
    assert claims <= 4


def test_pairing_takes_out_what_is_common() -> None:
    samples, reference = two_identical(1, 300, 0.5, 20.0)
    paired, alone = ratio(samples, reference, 0.5), ratio(samples, reference, 0.5, paired=False)
    assert paired is not None and alone is not None
    assert paired.high - paired.low < (alone.high - alone.low) / 2
    assert alone.low < 1 < alone.high


def test_too_few_samples_give_no_ratio() -> None:
    few = np.ones(29)
    assert ratio(few, few, 0.5) is None and ratio_in_rounds(few, few) is None
    assert ratio(np.ones(367), np.ones(500), 0.99) is None


def test_the_same_seed_gives_the_same_interval() -> None:
    pair = two_identical(3, 100, 0.3, 0.0)
    assert ratio(*pair, 0.5, seed=4) == ratio(*pair, 0.5, seed=4)
