"""The table of a report that says how a decoder writes."""

from collections.abc import Callable

from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import GOODPUT, ITL, TOKENS, TPOT, TTFT, Measurement

SHOWN = ((TTFT, "p50"), (TTFT, "p95"), (TTFT, "p99"), (TPOT, "p50"), (TPOT, "p95"), (TPOT, "p99"), (ITL, "p99"))

COLUMNS = (
    "shape",
    "subject",
    *(f"{what.upper()} {name} ms" for what, name in SHOWN),
    "tokens/s",
    "by baseline [95 %]",
    "goodput/s",
    "stable",
)


def generation_rows(
    report: Report,
    figure: Callable[[float | None], str],
    percentile: Callable[[Measurement, str], str],
    ratio: Callable[[Measurement], str],
    steady: Callable[[Measurement], str],
) -> list[tuple[str, ...]]:
    """A row for each subject and shape.

    Args:
        figure: shows a number; None where it is not known.
        percentile: shows one of a measurement, by its name.
        ratio: shows what a measurement is of the baseline.
        steady: shows whether its windows agree.
    """
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for item in report.of("generation"):
        found.setdefault((item.shape, item.subject), {})[item.variant] = item
    rows = []
    for key, items in found.items():
        shown = [percentile(items[what], name) if what in items else figure(None) for what, name in SHOWN]
        tokens = items[TOKENS]
        goodput = items.get(GOODPUT)
        rows.append(
            (
                *key,
                *shown,
                figure(tokens.throughput_per_s),
                ratio(tokens),
                figure(goodput.throughput_per_s if goodput else None),
                steady(tokens),
            )
        )
    return rows
