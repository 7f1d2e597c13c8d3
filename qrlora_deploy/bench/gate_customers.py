"""The gate's rules on customers: that their files can be served, how large they are, and how right they answer."""

from collections.abc import Iterator

from qrlora_deploy.bench.gate_file import AccuracyRule, GateRules
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import Accuracy, Verdict
from qrlora_deploy.bench.verdicts import least, most, verdict

NO_BASE = "the bundle has no base with these labels; judge such customers by a gate without max_drop"
"""Why there is no drop from the base: a merged bundle, or a customer with labels of its own."""


def judge_customers(report: Report, rules: GateRules) -> Iterator[Verdict]:
    """Every rule on customers' files, and on their accuracy."""
    for customer in report.customers:
        if customer.refused:
            yield verdict("customer", "", "failed", customer.refused, customer=customer.name)
        if rules.size is not None and rules.size.max_customer_bytes is not None:
            limit = rules.size.max_customer_bytes
            yield from most("size.max_customer_bytes", "", customer.size_bytes, limit, customer.name)
    if rules.accuracy is None:
        return
    candidates = {subject.name for subject in report.subjects if subject.role == "candidate"}
    found = [item for item in report.accuracy if item.subject in candidates]
    missing = rules.accuracy.data.keys() - {item.customer for item in found}
    if not found or missing:
        whose = f" of {', '.join(sorted(missing))}" if missing else ""
        yield verdict("accuracy", "", "unknown", f"the accuracy{whose} was not measured; give labelled files")
    for item in found:
        if item.error:
            yield verdict("accuracy", item.subject, "unknown", item.error, customer=item.customer)
            continue
        yield from _by_accuracy(item, rules.accuracy)
        yield from _by_loss(item, rules.accuracy)


def _by_accuracy(item: Accuracy, rules: AccuracyRule) -> Iterator[Verdict]:
    yield from least("accuracy.min", item.subject, item.accuracy, rules.min, item.customer)
    for rule, before, limit, unless in (
        ("accuracy.max_drop", item.base_accuracy, rules.max_drop, NO_BASE),
        ("accuracy.max_drop_to_reference", item.reference_accuracy, rules.max_drop_to_reference, ""),
    ):
        drop = before - item.accuracy if before is not None and item.accuracy is not None else None
        yield from most(rule, item.subject, drop, limit, item.customer, unless)


def _by_loss(item: Accuracy, rules: AccuracyRule) -> Iterator[Verdict]:
    yield from most("accuracy.max_nll", item.subject, item.nll, rules.max_nll, item.customer)
    for rule, before, limit in (
        ("accuracy.max_nll_over_base", item.base_nll, rules.max_nll_over_base),
        ("accuracy.max_nll_over_reference", item.reference_nll, rules.max_nll_over_reference),
    ):
        rise = item.nll - before if before is not None and item.nll is not None else None
        yield from most(rule, item.subject, rise, limit, item.customer)
