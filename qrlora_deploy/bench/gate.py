"""Verdicts: every rule of a gate on a report. Pure functions; nothing is measured here."""

from collections.abc import Iterator

from qrlora_deploy.bench.gate_customers import judge_customers
from qrlora_deploy.bench.gate_file import CapacityRule, GateRules, LatencyRule, ThroughputRule
from qrlora_deploy.bench.gate_generation import judge_generation
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import Gate, Subject, Verdict
from qrlora_deploy.bench.verdicts import compared, least, limited, missing, most, sign, title, verdict
from qrlora_deploy.errors import argument


def judge(report: Report, rules: GateRules, file: str) -> Gate:
    """Judge the candidates of a report.

    A rule that cannot be decided is "unknown" and fails: nothing measured, too few samples, windows
    that do not agree, or an interval that reaches over its limit.

    Args:
        file: name of the gate file, for the record.
    """
    verdicts = [
        found
        for subject in report.subjects
        if subject.role == "candidate"
        for found in _judge_subject(report, rules, subject)
    ]
    verdicts += judge_customers(report, rules)
    names = {customer.name for customer in report.customers} | {item.customer for item in report.accuracy}
    bad = {found.customer for found in verdicts if found.outcome != "passed"}
    customers = {name: name not in bad for name in sorted(names)}
    return Gate(
        file=file,
        verdicts=verdicts,
        customers=customers,
        passed=all(found.outcome == "passed" for found in verdicts),
    )


def _judge_subject(report: Report, rules: GateRules, subject: Subject) -> Iterator[Verdict]:
    for rule in rules.latency:
        yield from _latency(report, rules, rule, subject.name)
    for each in rules.throughput:
        yield from _throughput(report, rules, each, subject.name)
    for wanted in rules.generation:
        yield from judge_generation(report, rules, wanted, subject.name)
    if rules.capacity is not None:
        yield from _capacity(report, rules.capacity, subject.name)
    parity = subject.parity
    if rules.parity is not None:
        error, agreement = (None, None) if parity is None else (parity.max_abs_error, parity.label_agreement)
        yield from most("parity.max_abs_error", subject.name, error, rules.parity.max_abs_error)
        yield from least("parity.min_label_agreement", subject.name, agreement, rules.parity.min_label_agreement)
    if rules.size is not None:
        yield from most("size.max_bundle_bytes", subject.name, subject.size_bytes, rules.size.max_bundle_bytes)
    if rules.memory is not None:
        used = subject.memory
        host, device = (None, None) if used is None else (used.host_peak_bytes, used.device_bytes)
        yield from most("memory.max_host_bytes", subject.name, host, rules.memory.max_host_bytes)
        yield from most("memory.max_device_bytes", subject.name, device, rules.memory.max_device_bytes)


def _latency(report: Report, rules: GateRules, rule: LatencyRule, subject: str) -> Iterator[Verdict]:
    name = f"latency.{rule.statistic}"
    found = [
        item
        for item in report.of(rule.scenario)
        if item.subject == subject and rule.shape in (None, item.shape) and rule.variant in (None, item.variant)
    ]
    if not found:
        yield verdict(name, subject, "unknown", missing(rule.scenario, rule.shape, rule.variant))
    for item in found:
        what = f"{rule.statistic} of {title(item)}"
        if rule.max_ms is not None:
            yield limited(rules, item, rule.statistic, f"{name}.max_ms", what, rule.max_ms)
        if rule.max_ratio is not None:
            yield compared(report, rules, item, rule.statistic, f"{name}.max_ratio", what, at_most=rule.max_ratio)


def _throughput(report: Report, rules: GateRules, rule: ThroughputRule, subject: str) -> Iterator[Verdict]:
    found = [item for item in report.of("offline") if item.subject == subject and rule.shape in (None, item.shape)]
    if not found:
        yield verdict("throughput", subject, "unknown", missing("offline", rule.shape))
    for item in found:
        what = f"rows per second of {title(item)}"
        if rule.min_rows_per_s is not None:
            yield limited(rules, item, "p50", "throughput.min_rows_per_s", what, rule.min_rows_per_s, least=True)
        if rule.min_ratio is not None:
            yield compared(report, rules, item, "p50", "throughput.min_ratio", what, at_least=rule.min_ratio)


def _capacity(report: Report, limits: CapacityRule, subject: str) -> Iterator[Verdict]:
    rule, fewest = "capacity.min_requests_per_s", limits.min_requests_per_s
    found = [item for item in report.capacities if item.subject == subject]
    if not found:
        yield verdict(rule, subject, "unknown", "the scenario server was not measured", limit=fewest)
    for item in found:
        what = f"requests per second with a p99 of {item.budget_ms:.4g} ms"
        rate = item.rate_per_s or 0.0
        if item.refused and rate < fewest:
            line = f"{what}: a p99 needs {item.refused} requests, more than fit; give more {argument('seconds')}"
            yield verdict(rule, subject, "unknown", line, limit=fewest)
        elif limits.p99_ms is not None and item.budget_ms > limits.p99_ms:
            least_budget = argument("p99_budget_ms", f"{limits.p99_ms:g}")
            line = f"{what}: the gate's budget is {limits.p99_ms:g} ms; measure with {least_budget}"
            yield verdict(rule, subject, "unknown", line, rate, fewest)
        else:
            met = rate >= fewest
            line = f"{what}: {rate:.4g} {sign(True, met)} {fewest:g}"
            yield verdict(rule, subject, "passed" if met else "failed", line, rate, fewest)
