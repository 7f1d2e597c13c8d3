"""Verdicts: every rule of a gate on a report. Pure functions; nothing is measured here."""

from collections.abc import Iterator
from typing import Literal

from qrlora_deploy.bench.gate_file import CapacityRule, GateRules, LatencyRule, ThroughputRule
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import Comparison, Gate, Interval, Measurement, Subject, Verdict
from qrlora_deploy.errors import argument

Outcome = Literal["passed", "failed", "unknown"]


def judge(report: Report, rules: GateRules, file: str) -> Gate:
    """Judge the candidates of a report.

    A rule that cannot be decided is "unknown" and fails: nothing measured, too few samples, windows
    that do not agree, or an interval that reaches over its limit.

    Args:
        file: name of the gate file, for the record.
    """
    verdicts = [
        verdict
        for subject in report.subjects
        if subject.role == "candidate"
        for verdict in _judge_subject(report, rules, subject)
    ]
    verdicts += _judge_customers(report, rules)
    names = {customer.name for customer in report.customers} | {item.customer for item in report.accuracy}
    bad = {verdict.customer for verdict in verdicts if verdict.outcome != "passed"}
    customers = {name: name not in bad for name in sorted(names)}
    return Gate(
        file=file,
        verdicts=verdicts,
        customers=customers,
        passed=all(verdict.outcome == "passed" for verdict in verdicts),
    )


def _judge_subject(report: Report, rules: GateRules, subject: Subject) -> Iterator[Verdict]:
    for rule in rules.latency:
        yield from _latency(report, rules, rule, subject.name)
    for each in rules.throughput:
        yield from _throughput(report, rules, each, subject.name)
    if rules.capacity is not None:
        yield from _capacity(report, rules.capacity, subject.name)
    parity = subject.parity
    if rules.parity is not None:
        error, agreement = (None, None) if parity is None else (parity.max_abs_error, parity.label_agreement)
        yield from _most("parity.max_abs_error", subject.name, error, rules.parity.max_abs_error)
        yield from _least("parity.min_label_agreement", subject.name, agreement, rules.parity.min_label_agreement)
    if rules.size is not None:
        yield from _most("size.max_bundle_bytes", subject.name, subject.size_bytes, rules.size.max_bundle_bytes)
    if rules.memory is not None:
        used = subject.memory
        host, device = (None, None) if used is None else (used.host_peak_bytes, used.device_bytes)
        yield from _most("memory.max_host_bytes", subject.name, host, rules.memory.max_host_bytes)
        yield from _most("memory.max_device_bytes", subject.name, device, rules.memory.max_device_bytes)


def _latency(report: Report, rules: GateRules, rule: LatencyRule, subject: str) -> Iterator[Verdict]:
    name = f"latency.{rule.statistic}"
    found = [
        item
        for item in report.of(rule.scenario)
        if item.subject == subject and rule.shape in (None, item.shape) and rule.variant in (None, item.variant)
    ]
    if not found:
        yield _verdict(name, subject, "unknown", _missing(rule.scenario, rule.shape, rule.variant))
    for item in found:
        what = f"{rule.statistic} of {_title(item)}"
        if rule.max_ms is not None:
            yield _limited(rules, item, rule.statistic, f"{name}.max_ms", what, rule.max_ms)
        if rule.max_ratio is not None:
            yield _compared(report, rules, item, rule.statistic, f"{name}.max_ratio", what, at_most=rule.max_ratio)


def _throughput(report: Report, rules: GateRules, rule: ThroughputRule, subject: str) -> Iterator[Verdict]:
    found = [item for item in report.of("offline") if item.subject == subject and rule.shape in (None, item.shape)]
    if not found:
        yield _verdict("throughput", subject, "unknown", _missing("offline", rule.shape))
    for item in found:
        what = f"rows per second of {_title(item)}"
        if rule.min_rows_per_s is not None:
            yield _limited(rules, item, "p50", "throughput.min_rows_per_s", what, rule.min_rows_per_s, least=True)
        if rule.min_ratio is not None:
            yield _compared(report, rules, item, "p50", "throughput.min_ratio", what, at_least=rule.min_ratio)


def _limited(
    rules: GateRules, item: Measurement, statistic: str, rule: str, what: str, limit: float, least: bool = False
) -> Verdict:
    """A percentile by an absolute limit."""
    found = item.percentiles.get(statistic)
    if found is None:
        needed = item.refused.get(statistic, 0)
        line = f"{what}: {len(item.samples)} samples, {needed} are needed; give more {argument('seconds')}"
        return _verdict(rule, item.subject, "unknown", line, limit=limit)
    met = found.value >= limit if least else found.value <= limit
    line = f"{what}: {found.value:.4g} {_sign(least, met)} {limit:g} {item.unit}"
    outcome: Outcome = "passed" if met else "failed"
    return _steady(rules, item, _verdict(rule, item.subject, outcome, line, found.value, limit, found))


def _compared(
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
            return _verdict(rule, item.subject, "passed", f"{what}: it is the baseline itself", 1.0, limit)
        line = f"{what}: not compared; give {argument('reference')} or a second bundle, and more {argument('seconds')}"
        return _verdict(rule, item.subject, "unknown", line, limit=limit)
    if found.caveat:
        line = f"{what}: {found.baseline} is no reference, {found.caveat}; measure both in one run"
        return _verdict(rule, item.subject, "unknown", line, found.ratio.value, limit, found.ratio)
    ratio = found.ratio
    shown = f"{what}: {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of {found.baseline}"
    if at_most is not None:
        outcome, line = _by_interval(ratio.high <= at_most, ratio.low > at_most), f"{shown}, limit {at_most:g}"
    else:
        least = at_least or 0.0
        outcome, line = _by_interval(ratio.low >= least, ratio.high < least), f"{shown}, limit {least:g}"
    if outcome == "unknown":
        line += f"; the interval reaches over it, give more {argument('seconds')}"
    return _steady(rules, item, _verdict(rule, item.subject, outcome, line, ratio.value, limit, ratio))


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


def _capacity(report: Report, limits: CapacityRule, subject: str) -> Iterator[Verdict]:
    rule, least = "capacity.min_requests_per_s", limits.min_requests_per_s
    found = [item for item in report.capacities if item.subject == subject]
    if not found:
        yield _verdict(rule, subject, "unknown", "the scenario server was not measured", limit=least)
    for item in found:
        what = f"requests per second with a p99 of {item.budget_ms:.4g} ms"
        rate = item.rate_per_s or 0.0
        if item.refused and rate < least:
            line = f"{what}: a p99 needs {item.refused} requests, more than fit; give more {argument('seconds')}"
            yield _verdict(rule, subject, "unknown", line, limit=least)
        elif limits.p99_ms is not None and item.budget_ms > limits.p99_ms:
            least_budget = argument("p99_budget_ms", f"{limits.p99_ms:g}")
            line = f"{what}: the gate's budget is {limits.p99_ms:g} ms; measure with {least_budget}"
            yield _verdict(rule, subject, "unknown", line, rate, least)
        else:
            met = rate >= least
            line = f"{what}: {rate:.4g} {_sign(True, met)} {least:g}"
            yield _verdict(rule, subject, "passed" if met else "failed", line, rate, least)


def _judge_customers(report: Report, rules: GateRules) -> Iterator[Verdict]:
    for customer in report.customers:
        if customer.refused:
            yield _verdict("customer", "", "failed", customer.refused, customer=customer.name)
        if rules.size is not None and rules.size.max_customer_bytes is not None:
            limit = rules.size.max_customer_bytes
            yield from _most("size.max_customer_bytes", "", customer.size_bytes, limit, customer.name)
    if rules.accuracy is None:
        return
    candidates = {subject.name for subject in report.subjects if subject.role == "candidate"}
    found = [item for item in report.accuracy if item.subject in candidates]
    missing = rules.accuracy.data.keys() - {item.customer for item in found}
    if not found or missing:
        whose = f" of {', '.join(sorted(missing))}" if missing else ""
        yield _verdict("accuracy", "", "unknown", f"the accuracy{whose} was not measured; give labelled files")
    for item in found:
        if item.error:
            yield _verdict("accuracy", item.subject, "unknown", item.error, customer=item.customer)
            continue
        yield from _least("accuracy.min", item.subject, item.accuracy, rules.accuracy.min, item.customer)
        for rule, before, most in (
            ("accuracy.max_drop", item.base_accuracy, rules.accuracy.max_drop),
            ("accuracy.max_drop_to_reference", item.reference_accuracy, rules.accuracy.max_drop_to_reference),
        ):
            drop = before - item.accuracy if before is not None and item.accuracy is not None else None
            yield from _most(rule, item.subject, drop, most, item.customer)


def _most(
    rule: str, subject: str, measured: float | None, limit: float | None, customer: str = ""
) -> Iterator[Verdict]:
    if limit is not None:
        met = measured is not None and measured <= limit
        yield _plain(rule, subject, measured, limit, customer, _sign(False, met), met)


def _least(
    rule: str, subject: str, measured: float | None, limit: float | None, customer: str = ""
) -> Iterator[Verdict]:
    if limit is not None:
        met = measured is not None and measured >= limit
        yield _plain(rule, subject, measured, limit, customer, _sign(True, met), met)


def _plain(
    rule: str, subject: str, measured: float | None, limit: float, customer: str, sign: str, met: bool
) -> Verdict:
    what = rule.partition(".")[2].removeprefix("max_").removeprefix("min_").replace("_", " ")
    what = "accuracy" if rule == "accuracy.min" else what
    if measured is None:
        return _verdict(rule, subject, "unknown", f"{what} is not known", limit=limit, customer=customer)
    line = f"{what} {_number(measured)} {sign} {_number(limit)}"
    return _verdict(rule, subject, "passed" if met else "failed", line, measured, limit, customer=customer)


def _verdict(
    rule: str,
    subject: str,
    outcome: Outcome,
    line: str,
    measured: float | None = None,
    limit: float | None = None,
    interval: Interval | None = None,
    customer: str = "",
) -> Verdict:
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


def _sign(least: bool, met: bool) -> str:
    """How the measured number stands to its limit."""
    return (">=" if met else "<") if least else ("<=" if met else ">")


def _missing(*parts: str | None) -> str:
    sizes = f"{argument('batches')} and {argument('lengths')}"
    return f"{' '.join(filter(None, parts))} was not measured; see {argument('scenarios')}, {sizes}"


def _title(item: Measurement) -> str:
    return " ".join(filter(None, (item.scenario, item.shape, item.variant)))
