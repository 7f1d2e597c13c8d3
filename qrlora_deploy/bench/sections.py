"""What a report says, as tables of text: the same ones for the terminal, a pull request and the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from qrlora_deploy.bench.generation_section import COLUMNS, generation_rows
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import Comparison, Measurement, Subject, shape_name

SHOWN = ("p50", "p90", "p95", "p99", "p99.9")
MB = 1e6
NOTHING = "-"

MOST_CUSTOMERS = 20
"""Rows of the table of customers: those that did not pass come first. The report has all of them."""


@dataclass(frozen=True)
class Section:
    """A table with its title.

    Attributes:
        columns: the first `names` of them hold names, the others figures.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int = 2


def sections(report: Report) -> list[Section]:
    """All tables that have rows, in the order in which a reader wants them."""
    made = [
        _verdicts(report),
        _customers(report),
        _latency(report),
        _throughput(report),
        _generation(report),
        _capacity(report),
        _server(report),
        _others(report),
        _accuracy(report),
        _subjects(report),
        _environment(report),
    ]
    return [section for section in made if section.rows]


def verdict_line(report: Report) -> str:
    """One line: what became of the rollout."""
    if report.gate is None:
        return f"{count(len(report.subjects), 'subject')} measured; no gate was given"
    bad = [verdict for verdict in report.gate.verdicts if verdict.outcome != "passed"]
    if report.gate.passed:
        return f"PASSED: {count(len(report.gate.verdicts), 'check')} of {report.gate.file}"
    unknown = sum(verdict.outcome == "unknown" for verdict in bad)
    undecided = f", {unknown} of them undecided" if unknown else ""
    return f"FAILED: {len(bad)} of {count(len(report.gate.verdicts), 'check')} of {report.gate.file}{undecided}"


def count(number: int, noun: str) -> str:
    """Such as `1 check`, `2 checks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def figure(value: float | None) -> str:
    """Four significant digits."""
    return NOTHING if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def ratio_text(found: Sequence[Comparison]) -> str:
    """The first ratio with its interval, and whether a difference is claimed."""
    if not found:
        return NOTHING
    ratio = found[0].ratio
    shown = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
    return shown if found[0].difference != "none" else f"{shown} same"


def _verdicts(report: Report) -> Section:
    verdicts = report.gate.verdicts if report.gate is not None else []
    order = {"failed": 0, "unknown": 1, "passed": 2}
    rows = [
        (verdict.outcome, verdict.rule, verdict.line)
        for verdict in sorted(verdicts, key=lambda verdict: order[verdict.outcome])
    ]
    return Section("Verdicts", ("verdict", "rule", "what was found"), rows, names=3)


def _customers(report: Report) -> Section:
    passed = report.gate.customers if report.gate is not None else {}
    rows = []
    for customer in report.customers:
        judged = "passed" if passed.get(customer.name) else "failed" if customer.name in passed else NOTHING
        verdict = "refused" if customer.refused else judged
        rows.append((customer.name, verdict, customer.digest[:12], f"{customer.size_bytes:,}"))
    rows.sort(key=lambda row: row[1] in ("passed", NOTHING))
    left = len(rows) - MOST_CUSTOMERS
    if left > 0:
        bad = sum(row[1] in ("failed", "refused") for row in rows[MOST_CUSTOMERS:])
        rows[MOST_CUSTOMERS:] = [(f"and {left} more", f"{bad} of them bad" if bad else NOTHING, NOTHING, NOTHING)]
    return Section("Customers", ("customer", "verdict", "SHA-256", "bytes"), rows, names=3)


def _latency(report: Report) -> Section:
    rows = []
    for item in report.of("single-stream"):
        ratio = ratio_text(report.comparisons_of(item, "p50"))
        rows.append(
            (item.shape, item.subject, *_percentiles(item), figure(item.throughput_per_s), ratio, _steady(item))
        )
    columns = ("shape", "subject", *(f"{name} ms" for name in SHOWN), "rows/s", "p50 by baseline [95 %]", "stable")
    return Section("Latency of single runs", columns, rows)


def _percentiles(item: Measurement) -> tuple[str, ...]:
    return tuple(_percentile(item, name) for name in SHOWN)


def _percentile(item: Measurement, name: str) -> str:
    """The figure, or how many samples it needs where they are missing."""
    found, needed = item.percentiles.get(name), item.refused.get(name)
    return figure(found.value) if found else f"{len(item.samples)} of {needed:,}" if needed else NOTHING


def _steady(item: Measurement) -> str:
    if item.stable is None:
        return NOTHING
    spread = "too few windows" if item.spread is None else f"{item.spread:.1%}"
    return f"{'yes' if item.stable else 'NO'}, {spread}"


def _throughput(report: Report) -> Section:
    rows = []
    for item in report.of("offline"):
        median = item.percentiles.get("p50")
        interval = f"[{figure(median.low)}, {figure(median.high)}]" if median else NOTHING
        ratio = ratio_text(report.comparisons_of(item, "p50"))
        rows.append((item.shape, item.subject, figure(item.throughput_per_s), interval, ratio, _steady(item)))
    columns = ("shape", "subject", "rows/s", "[95 %]", "by baseline [95 %]", "stable")
    return Section("Throughput of runs back to back", columns, rows)


def _generation(report: Report) -> Section:
    rows = generation_rows(
        report, figure, _percentile, lambda item: ratio_text(report.comparisons_of(item, "p50")), _steady
    )
    return Section("Answers of decoders, token by token", COLUMNS, rows)


def _capacity(report: Report) -> Section:
    rows = []
    for item in report.capacities:
        rate = figure(item.rate_per_s) if item.rate_per_s is not None else "none that was tried"
        limit = f"needs {item.refused} requests" if item.refused else "yes" if item.bounded else "no"
        budget = figure(item.budget_ms) if item.tpot_ms is None else f"{figure(item.budget_ms)}, {figure(item.tpot_ms)}"
        rows.append((shape_name(item.batch, item.length), item.subject, budget, rate, limit))
    columns = ("shape", "subject", "budget of the p99, ms", "requests/s within it", "a higher rate failed")
    return Section("Server: the largest rate within a budget", columns, rows)


def _server(report: Report) -> Section:
    rows = []
    for item in sorted(report.of("server"), key=lambda item: (item.subject, item.offered_per_s or 0.0)):
        shown = ("the queue grew", *[NOTHING] * (len(SHOWN) - 1)) if item.saturated else _percentiles(item)
        rows.append((item.shape, item.subject, figure(item.offered_per_s), *shown))
    columns = ("shape", "subject", "requests/s", *(f"{name} ms" for name in SHOWN))
    return Section("Server: latency at each rate", columns, rows)


def _others(report: Report) -> Section:
    rows = []
    for item in report.measurements:
        if item.scenario in ("idle-gap", "cold-start", "swap"):
            title = f"{item.scenario} {item.variant}".strip()
            rows.append((title, item.subject, item.shape, str(len(item.samples)), *_percentiles(item)))
    columns = ("scenario", "subject", "shape", "samples", *(f"{name} ms" for name in SHOWN))
    return Section("After a rest, from a cold start, under swaps", columns, rows)


def _accuracy(report: Report) -> Section:
    written = any(item.nll is not None for item in report.accuracy)
    rows = []
    for item in report.accuracy:
        base = figure(item.base_accuracy)
        losses = (figure(item.nll), figure(item.base_nll)) if written else ()
        rows.append((item.customer, item.subject, str(item.rows), item.error or figure(item.accuracy), base, *losses))
    columns: tuple[str, ...] = ("customer", "subject", "rows", "accuracy", "of the base")
    columns += ("loss a token", "of the base") if written else ()
    return Section("Accuracy on labelled files", columns, rows)


def _subjects(report: Report) -> Section:
    columns = ("subject", "role", "kind", "precision", "provider", "options", "size MB", "host peak MB", "device MB")
    more = ("max error", "labels agree", "digest")
    return Section("What was measured", columns + more, [_subject(subject) for subject in report.subjects], names=6)


def _subject(subject: Subject) -> tuple[str, ...]:
    memory, parity = subject.memory, subject.parity
    device = memory.device_bytes if memory is not None else None
    return (
        subject.name,
        subject.role,
        subject.kind,
        subject.precision,
        subject.provider,
        ", ".join(f"{name} {value}" for name, value in subject.options.items()) or NOTHING,
        figure(subject.size_bytes / MB),
        figure(memory.host_peak_bytes / MB if memory is not None else None),
        figure(device / MB if device is not None else None),
        figure(parity.max_abs_error if parity is not None else None),
        f"{parity.label_agreement:.2%}" if parity is not None else NOTHING,
        subject.digest[:12],
    )


def _environment(report: Report) -> Section:
    environment = report.environment
    facts: list[tuple[str, str]] = [("date", environment.date)]
    facts += [(name, str(value)) for name, value in environment.host.items() if value is not None]
    facts += [(f"GPU {index}", ", ".join(gpu.values())) for index, gpu in enumerate(environment.gpus)]
    facts += [("TF32", "on" if environment.tf32 else "off")]
    facts += [("versions", ", ".join(f"{name} {version}" for name, version in environment.versions.items()))]
    return Section("Where", ("fact", "value"), facts)
