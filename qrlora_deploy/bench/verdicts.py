"""Verdicts: how one is made, and what it says."""

from collections.abc import Iterator
from typing import Literal

from qrlora_deploy.bench.gate_file import GateRules
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import Comparison, Interval, Measurement, Verdict
from qrlora_deploy.errors import argument

Outcome = Literal["passed", "failed", "unknown"]


def limited(
    rules: GateRules, item: Measurement, statistic: str, rule: str, what: str, limit: float, least: bool = False
) -> Verdict:
    """A percentile by an absolute limit."""
    found = item.percentiles.get(statistic)
    if found is None:
        needed = item.refused.get(statistic, 0)
        line = f"{what}: {len(item.samples)} samples, {needed} are needed; give more {argument('seconds')}"
        return verdict(rule, item.subject, "unknown", line, limit=limit)
    met = found.value >= limit if least else found.value <= limit
    line = f"{what}: {found.value:.4g} {sign(least, met)} {limit:g} {item.unit}"
    outcome: Outcome = "passed" if met else "failed"
    return _steady(rules, item, verdict(rule, item.subject, outcome, line, found.value, limit, found))


def compared(
    report: Report,
    rules: GateRules,
    item: Measurement,
    statistic: str,
    rule: str,
    what: str,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Verdict:
    """A ratio to the baseline, judged by its interval."""
    limit = at_most if at_most is not None else at_least
    found = _comparison(report, item, statistic)
    if found is None:
        if any(other.baseline == item.subject and other.statistic == statistic for other in report.comparisons):
            return verdict(rule, item.subject, "passed", f"{what}: it is the baseline itself", 1.0, limit)
        line = f"{what}: not compared; give {argument('reference')} or a second bundle, and more {argument('seconds')}"
        return verdict(rule, item.subject, "unknown", line, limit=limit)
    if found.caveat:
        line = f"{what}: {found.baseline} is no reference, {found.caveat}; measure both in one run"
        return verdict(rule, item.subject, "unknown", line, found.ratio.value, limit, found.ratio)
    ratio = found.ratio
    shown = f"{what}: {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of {found.baseline}"
    if at_most is not None:
        outcome, line = _by_interval(ratio.high <= at_most, ratio.low > at_most), f"{shown}, limit {at_most:g}"
    else:
        least = at_least or 0.0
        outcome, line = _by_interval(ratio.low >= least, ratio.high < least), f"{shown}, limit {least:g}"
    if outcome == "unknown":
        line += f"; the interval reaches over it, give more {argument('seconds')}"
    return _steady(rules, item, verdict(rule, item.subject, outcome, line, ratio.value, limit, ratio))


def _by_interval(met: bool, broken: bool) -> Outcome:
    return "passed" if met else "failed" if broken else "unknown"


def _comparison(report: Report, item: Measurement, statistic: str) -> Comparison | None:
    """That with an earlier report where there is one: it is what was asked for."""
    found = report.comparisons_of(item, statistic)
    return next((other for other in found if not other.paired), found[0] if found else None)


def _steady(rules: GateRules, item: Measurement, verdict: Verdict) -> Verdict:
    """The verdict, or "unknown" where the windows of its measurement do not agree."""
    if item.stable is False and not rules.allow_unstable and verdict.outcome == "passed":
        spread = "too few windows" if item.spread is None else f"windows differ by {item.spread:.0%}"
        line = f"{verdict.line}, but not stable: {spread}; give more {argument('seconds')} or a quiet machine"
        return verdict.model_copy(update={"outcome": "unknown", "line": line})
    return verdict


def most(
    rule: str, subject: str, measured: float | None, limit: float | None, customer: str = "", unless: str = ""
) -> Iterator[Verdict]:
    """That a figure is at most a limit; nothing where there is none. `unless` says when there is no figure."""
    if limit is not None:
        met = measured is not None and measured <= limit
        yield _plain(rule, subject, measured, limit, customer, sign(False, met), met, unless)


def least(
    rule: str, subject: str, measured: float | None, limit: float | None, customer: str = ""
) -> Iterator[Verdict]:
    """That a figure is at least a limit; nothing where there is none."""
    if limit is not None:
        met = measured is not None and measured >= limit
        yield _plain(rule, subject, measured, limit, customer, sign(True, met), met)


def _plain(
    rule: str, subject: str, measured: float | None, limit: float, customer: str, sign: str, met: bool, unless: str = ""
) -> Verdict:
    what = rule.partition(".")[2].removeprefix("max_").removeprefix("min_").replace("_", " ")
    what = "accuracy" if rule == "accuracy.min" else what
    if measured is None:
        return verdict(
            rule, subject, "unknown", f"{what} is not known{unless and f': {unless}'}", limit=limit, customer=customer
        )
    line = f"{what} {_number(measured)} {sign} {_number(limit)}"
    return verdict(rule, subject, "passed" if met else "failed", line, measured, limit, customer=customer)


def verdict(
    rule: str,
    subject: str,
    outcome: Outcome,
    line: str,
    measured: float | None = None,
    limit: float | None = None,
    interval: Interval | None = None,
    customer: str = "",
) -> Verdict:
    """One, whose line begins with whose it is."""
    whose = " ".join(filter(None, (subject, customer)))
    return Verdict(
        rule=rule,
        subject=subject,
        customer=customer,
        measured=measured,
        limit=limit,
        interval=interval,
        outcome=outcome,
        line=f"{whose}: {line}" if whose else line,
    )


def _number(value: float) -> str:
    """Sizes in full, small numbers with six digits."""
    return f"{value:,.0f}" if abs(value) >= 1e6 else f"{value:.6g}"


def sign(least: bool, met: bool) -> str:
    """How the measured number stands to its limit."""
    return (">=" if met else "<") if least else ("<=" if met else ">")


def missing(*parts: str | None) -> str:
    """The line for what was not measured."""
    sizes = f"{argument('batches')} and {argument('lengths')}"
    return f"{' '.join(filter(None, parts))} was not measured; see {argument('scenarios')}, {sizes}"


def title(item: Measurement) -> str:
    """Scenario, shape and variant."""
    return " ".join(filter(None, (item.scenario, item.shape, item.variant)))
