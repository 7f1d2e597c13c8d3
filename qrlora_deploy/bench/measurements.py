"""From samples to the report: percentiles where there are enough, windows, and ratios to the baseline."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from qrlora_deploy.bench.report_parts import Comparison, Interval, Measurement, Scenario
from qrlora_deploy.bench.rounds import Series
from qrlora_deploy.bench.statistics import PERCENTILES, Estimate, needed_samples, percentile, ratio, ratio_in_rounds
from qrlora_deploy.bench.workload import Workload

SAME_WITHIN = 0.02
"""Nearer to 1 no difference is claimed: where its weights happen to lie in memory makes two openings
of the same bundle differ by 1 to 2 %, in the whole run and in one direction."""

COMPARED: dict[str, tuple[str, ...]] = {"single-stream": ("p50", "p99"), "offline": ("p50",), "generation": ("p50",)}
"""Statistics of the scenarios in which subjects take turns."""

THROUGHPUT_ONLY = ("p50",)
DIGITS = 6
"""Of a sample: nanoseconds, where they are milliseconds."""


def make_measurement(
    subject: str, scenario: Scenario, workload: Workload, samples: Sequence[float], variant: str = ""
) -> Measurement:
    """A measurement of latencies in milliseconds, without windows."""
    percentiles, refused = percentiles_of(samples, tuple(PERCENTILES))
    return Measurement(
        subject=subject,
        scenario=scenario,
        batch=workload.batch,
        length=workload.length,
        variant=variant,
        samples=[round(sample, DIGITS) for sample in samples],
        percentiles=percentiles,
        refused=refused,
    )


def measurement_of(subject: str, scenario: Scenario, workload: Workload, series: Series) -> Measurement:
    """A measurement in turn: latencies in seconds, or rows per second in the scenario offline."""
    rate = scenario == "offline"
    scale = 1.0 if rate else 1e3
    samples = [sample * scale for sample in series.samples]
    percentiles, refused = percentiles_of(samples, THROUGHPUT_ONLY if rate else tuple(PERCENTILES))
    judged = series.stability
    throughput = float(np.median(samples)) if rate else workload.batch * len(samples) / sum(series.samples)
    return make_measurement(subject, scenario, workload, samples).model_copy(
        update={
            "unit": "rows/s" if rate else "ms",
            "warmup": [round(seconds * 1e3, DIGITS) for seconds in series.warmup],
            "percentiles": percentiles,
            "refused": refused,
            "windows": [round(median * scale, DIGITS) for median in series.windows],
            "spread": judged.spread,
            "stable": judged.stable,
            "throughput_per_s": throughput,
        }
    )


def compare(measurements: Sequence[Measurement], baseline: str, seed: int) -> list[Comparison]:
    """Every other subject by the baseline, in the scenarios where they were measured in turn."""
    theirs = {item.key: item for item in measurements if item.subject == baseline}
    return [
        found
        for item in measurements
        if item.subject != baseline and item.key in theirs
        for found in _compare(item, theirs[item.key], baseline, True, seed)
    ]


def compare_earlier(
    measurements: Sequence[Measurement],
    earlier: Sequence[Measurement],
    names: Mapping[str, str],
    seed: int,
    caveat: str = "",
) -> list[Comparison]:
    """Subjects by those of an earlier report.

    Args:
        measurements: of this run. earlier: of the other one.
        names: the earlier subject of each of this run's.
        caveat: why they are not to be compared; empty where they are.
    """
    theirs = {(item.subject, item.key): item for item in earlier}
    return [
        found.model_copy(update={"caveat": caveat})
        for item in measurements
        if (names.get(item.subject, ""), item.key) in theirs
        for found in _compare(item, theirs[names[item.subject], item.key], "earlier report", False, seed)
    ]


def _compare(item: Measurement, other: Measurement, baseline: str, paired: bool, seed: int) -> list[Comparison]:
    made = []
    for statistic in COMPARED.get(item.scenario, ()):
        samples, reference = np.array(item.samples), np.array(other.samples)
        if paired and statistic == "p50":
            found = ratio_in_rounds(samples, reference, seed)
        else:
            found = ratio(samples, reference, PERCENTILES[statistic], paired, seed)
        if found is not None:
            made.append(
                Comparison(
                    subject=item.subject,
                    baseline=baseline,
                    scenario=item.scenario,
                    batch=item.batch,
                    length=item.length,
                    variant=item.variant,
                    statistic=statistic,
                    ratio=interval(found),
                    paired=paired,
                    difference=difference(found),
                )
            )
    return made


def difference(found: Estimate) -> Literal["less", "more", "none"]:
    """What may be claimed of a ratio."""
    if found.low > 1 + SAME_WITHIN:
        return "more"
    return "less" if found.high < 1 / (1 + SAME_WITHIN) else "none"


def interval(estimate: Estimate) -> Interval:
    """For the report."""
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)


def percentiles_of(samples: Sequence[float], names: Sequence[str]) -> tuple[dict[str, Interval], dict[str, int]]:
    """The percentiles for which there are enough samples, and how many the others need."""
    values = np.array(samples)
    found = {name: percentile(values, PERCENTILES[name]) for name in names}
    refused = {name: needed_samples(PERCENTILES[name]) for name, estimate in found.items() if estimate is None}
    return {name: interval(estimate) for name, estimate in found.items() if estimate is not None}, refused
