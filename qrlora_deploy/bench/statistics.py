"""Statistics of latencies: percentiles with enough samples only, stability, and ratios with intervals.

Samples are 1-D float arrays in any unit, in the order in which they were taken. Nothing is ever
removed from them: an outlier of a benchmark is a slow answer of a server.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
"""Of every interval."""

PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}

STABLE_WINDOWS = 3
STABLE_WITHIN = 0.10
"""Stable: the medians of the last three windows lie within 10 % of their mean, as perf_analyzer has it."""

RESAMPLES = 1000
CHUNK = 100
"""Resamples drawn at a time, which bounds the memory."""

MIN_PAIRS = 30
"""Fewer samples give no interval of a ratio: there would be no blocks to speak of."""

NORMAL_QUANTILE = 1.959964
"""Of `(1 + CONFIDENCE) / 2`."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval of `CONFIDENCE`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Stability:
    """Whether the last windows agree.

    Attributes:
        stable: they do.
        spread: largest distance of one of them from their mean, relative to it.
            None with too few windows.
    """

    stable: bool
    spread: float | None


def needed_samples(share: float) -> int:
    """Samples without which a percentile is not reported.

    The least `n` with `1 - share**n >= (1 + CONFIDENCE) / 2` and the same for the other side: with
    fewer, all samples may well lie on one side of the percentile, and no interval between two of
    them holds it with `CONFIDENCE`. 6 for the median, 36, 72, 368 and 3,688 for p90, p95, p99 and
    p99.9. MLPerf's early stopping asks the same question, one-sided at 99 %: 459 for p99.
    """
    outside = (1 - CONFIDENCE) / 2
    return math.ceil(math.log(outside) / math.log(max(share, 1 - share)))


def quantile(samples: np.ndarray, share: float) -> float:
    """The smallest sample that at least `share` of all do not exceed: one that was really seen."""
    return float(np.quantile(samples, share, method="inverted_cdf"))


def percentile(samples: np.ndarray, share: float) -> Estimate | None:
    """A percentile, and its interval between two samples; None with fewer than `needed_samples`.

    The number of samples below the percentile is binomial, whatever their distribution. That takes
    them for independent; slow spells that last make the true interval wider.
    """
    count = len(samples)
    if count < needed_samples(share):
        return None
    ordered = np.sort(samples)
    below = np.cumsum(_binomial(count, share))
    outside = (1 - CONFIDENCE) / 2
    # P(the percentile is less than sample number k, from 0) = P(at most k samples are below it).
    low = int(np.searchsorted(below, outside, side="right")) - 1
    high = int(np.searchsorted(below, 1 - outside))
    return Estimate(quantile(samples, share), float(ordered[max(low, 0)]), float(ordered[min(high, count - 1)]))


def stability(medians: Sequence[float]) -> Stability:
    """Judge the medians of windows, in the order in which they were taken."""
    if len(medians) < STABLE_WINDOWS:
        return Stability(False, None)
    last = np.asarray(medians[-STABLE_WINDOWS:], dtype=np.float64)
    spread = float(np.abs(last / last.mean() - 1).max())
    return Stability(spread <= STABLE_WITHIN, spread)


def ratio(
    samples: np.ndarray, reference: np.ndarray, share: float, paired: bool = True, seed: int = 0
) -> Estimate | None:
    """A percentile of `samples` by that of `reference`, with a block bootstrap's interval.

    Consecutive latencies are not independent: heat, other processes and the allocator have spells.
    So whole blocks of consecutive rounds are drawn, as long as the dependence lasts (`block_length`),
    and where the two were measured in turn, the same rounds of both: what slowed them down
    together cancels. The interval is `exp(log ratio ± t * standard error)`, with as many degrees of
    freedom as there are blocks: a bootstrap's own percentiles are too narrow with few of them.

    Args:
        samples: the one in question. reference: the other one.
        share: such as 0.99.
        paired: sample `i` of both is from the same round.
        seed: of the resampling.

    Returns:
        None where either has too few samples for the percentile or for an interval.
    """
    least = max(MIN_PAIRS, needed_samples(share))
    if min(len(samples), len(reference)) < least:
        return None
    random = np.random.default_rng(seed)
    if paired:
        count = min(len(samples), len(reference))
        series = [np.asarray(samples[:count]), np.asarray(reference[:count])]
        length = block_length(_exceeds(series[0], share) - _exceeds(series[1], share))
        lengths, blocks = [length, length], count / length
    else:
        series = [np.asarray(samples), np.asarray(reference)]
        lengths = [block_length(_exceeds(values, share)) for values in series]
        blocks = min(len(values) / length for values, length in zip(series, lengths, strict=True))
    drawn = _resample(series, lengths, share, paired, random)
    point = math.log(quantile(series[0], share) / quantile(series[1], share))
    return _estimate(point, drawn, blocks)


def ratio_in_rounds(samples: np.ndarray, reference: np.ndarray, seed: int = 0) -> Estimate | None:
    """The median of the ratios of samples of the same round, with its interval.

    Beside other work a latency has two or three levels, and the ratio of two medians jumps between
    them; two runs of one round mostly meet the same level. On a busy machine this interval is half
    as wide as that of `ratio`, on a quiet one they agree.

    Returns:
        None with too few samples for an interval.
    """
    count = min(len(samples), len(reference))
    if count < MIN_PAIRS:
        return None
    logs = np.log(np.asarray(samples[:count]) / np.asarray(reference[:count]))
    length = block_length(_exceeds(logs, 0.5))
    random = np.random.default_rng(seed)
    drawn = [np.median(logs[_places(count, length, random)], axis=1) for _ in range(RESAMPLES // CHUNK)]
    return _estimate(float(np.median(logs)), np.concatenate(drawn), count / length)


def _estimate(log_ratio: float, drawn: np.ndarray, blocks: float) -> Estimate:
    """From a logarithm of a ratio, and those of its resamples."""
    margin = student_quantile(max(blocks - 1, 3.0)) * float(np.std(drawn, ddof=1))
    return Estimate(math.exp(log_ratio), math.exp(log_ratio - margin), math.exp(log_ratio + margin))


def _resample(
    series: list[np.ndarray], lengths: list[int], share: float, paired: bool, random: np.random.Generator
) -> np.ndarray:
    """`[RESAMPLES]` logarithms of the ratio."""
    drawn = []
    for _ in range(RESAMPLES // CHUNK):
        places = [_places(len(values), length, random) for values, length in zip(series, lengths, strict=True)]
        if paired:
            places[1] = places[0]
        found = [
            np.quantile(values[place], share, axis=1, method="inverted_cdf")
            for values, place in zip(series, places, strict=True)
        ]
        drawn.append(np.log(found[0] / found[1]))
    return np.concatenate(drawn)


def _places(count: int, length: int, random: np.random.Generator) -> np.ndarray:
    """`[CHUNK, count]` positions: blocks from anywhere, going on at the start where they reach the end."""
    starts = random.integers(0, count, (CHUNK, -(-count // length)))
    places = (starts[:, :, None] + np.arange(length)) % count
    return np.asarray(places.reshape(CHUNK, -1)[:, :count])


def _exceeds(values: np.ndarray, share: float) -> np.ndarray:
    """What each sample adds to the error of the percentile, up to a factor."""
    return (values > quantile(values, share)).astype(np.float64)


def block_length(values: np.ndarray) -> int:
    """Samples per block: twice what Politis and White (2004, corrected 2009) give for circular blocks.

    Their rule sums the dependence up to twice the lag behind which autocorrelations stay within
    `2 sqrt(log10(n) / n)`, and makes the error of the variance smallest. Intervals want longer
    blocks: with an autocorrelation of 0.8, twice as long ones bring the false claims of 250 samples
    from 11 to 8 %, and cost nothing where there is none. Never less than `2 n^(1/3)`, since a short
    series hides its dependence, nor more than `n / 6`.
    """
    count = len(values)
    least, most = math.ceil(2 * count ** (1 / 3)), math.ceil(min(3 * math.sqrt(count), count / 3))
    correlations = _autocovariances(values, most + 5)
    if correlations[0] <= 0:
        return _within(least, least, count)
    small = np.abs(correlations[1:] / correlations[0]) < 2 * math.sqrt(math.log10(count) / count)
    run = max(5, math.ceil(math.sqrt(math.log10(count))))
    lag = next((lag for lag in range(len(small)) if small[lag : lag + run].all()), len(small))
    lags = np.arange(1, min(2 * max(lag, 1), len(correlations) - 1) + 1)
    # The flat-top window: 1 up to half of it, then down to 0.
    weights = np.clip(2 * (1 - lags / (2 * max(lag, 1))), 0, 1)
    spectrum = correlations[0] + 2 * float((weights * correlations[lags]).sum())
    slope = 2 * float((weights * lags * correlations[lags]).sum())
    length = (2 * slope**2 / (4 / 3 * spectrum**2)) ** (1 / 3) * count ** (1 / 3) if spectrum > 0 else most
    return _within(2 * math.ceil(length), least, count)


def _within(length: int, least: int, count: int) -> int:
    return max(1, min(max(length, least), count // 6))


def _autocovariances(values: np.ndarray, lags: int) -> np.ndarray:
    centred = values - values.mean()
    count = len(values)
    return np.array([centred[: count - lag] @ centred[lag:] / count for lag in range(min(lags, count - 1) + 1)])


def student_quantile(freedom: float) -> float:
    """Student's t at `(1 + CONFIDENCE) / 2`, by the Cornish-Fisher series: off by 1 % at 3, less above."""
    z = NORMAL_QUANTILE
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _binomial(count: int, share: float) -> np.ndarray:
    """`[count + 1]` probabilities of 0 to `count` successes."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    successes = np.arange(count + 1)
    chosen = logs[count] - logs[successes] - logs[count - successes]
    return np.asarray(np.exp(chosen + successes * math.log(share) + (count - successes) * math.log1p(-share)))
