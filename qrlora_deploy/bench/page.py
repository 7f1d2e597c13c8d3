"""The report as one HTML page that needs nothing beside itself: for a screen, a phone and paper."""

from collections.abc import Iterable, Sequence
from html import escape

from qrlora_deploy.bench.plots import draw_figures
from qrlora_deploy.bench.record import Report, Verdict

CSS = """
:root { color-scheme: light dark; --ink: #1c2126; --paper: #ffffff; --faint: #c3c9cf; --soft: #f3f5f7;
  --good: #0a7a4b; --bad: #c0302b; --open: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #15181c; --faint: #4a525a; --soft: #1e2328;
    --good: #4cc38a; --bad: #ff7b72; --open: #e3b341; } }
@media print {
  :root { --ink: #000; --paper: #fff; --faint: #bbb; --soft: #fff; --good: #064; --bad: #a00; --open: #850; }
  figure, tr, .card { break-inside: avoid; } body { font-size: 10pt; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; } .quiet { opacity: .75; font-size: .9rem; }
.verdict { display: inline-block; padding: .15rem .7rem; border-radius: 1rem; border: 2px solid; font-weight: 600; }
.passed { color: var(--good); } .failed { color: var(--bad); } .unknown { color: var(--open); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; padding: .8rem; background: var(--soft); border-radius: .6rem; }
figcaption { font-weight: 600; margin-bottom: .4rem; } figure svg { width: 100%; height: auto; display: block; }
ul { margin: .3rem 0; padding-left: 1.2rem; }
"""


def render_page(report: Report) -> str:
    """The page, complete and without a script."""
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in draw_figures(report).items()
    )
    parts = [
        _head(report),
        _section("Verdicts", _verdicts(report)),
        _section("Figures", f'<div class="figures">{figures}</div>' if figures else ""),
        _section("Latency and throughput", _measurements(report)),
        _section("Compared", _comparisons(report)),
        _section("Accuracy", _accuracy(report)),
        _section("What was measured", _subjects(report)),
        _section("Where", _environment(report)),
    ]
    title = "Benchmark of " + ", ".join(subject.name for subject in report.subjects)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _head(report: Report) -> str:
    names = " · ".join(escape(subject.name) for subject in report.subjects)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    gate = ""
    if report.gate is not None:
        outcome = "passed" if report.gate.passed else "failed"
        gate = f'<p><span class="verdict {outcome}">rollout {outcome}</span> by {escape(report.gate.file)}</p>'
    where = f"{report.environment.date}, provider {report.settings.provider}"
    return f'<h1>{names}</h1><p class="quiet">{escape(where)}</p>{gate}' + (
        f'<div class="card"><p>Before you believe the figures:</p><ul>{notes}</ul></div>' if notes else ""
    )


def _verdicts(report: Report) -> str:
    if report.gate is None:
        return ""
    order = {"failed": 0, "unknown": 1, "passed": 2}
    rows = [_verdict_row(verdict) for verdict in sorted(report.gate.verdicts, key=lambda item: order[item.outcome])]
    customers = "".join(
        f"<tr><td>{escape(name)}</td><td>{_badge('passed' if passed else 'failed')}</td></tr>"
        for name, passed in report.gate.customers.items()
    )
    table = _table(["", "what was found, and the rule"], rows)
    return table + (f"<h2>Customers</h2>{_wrap(f'<table>{customers}</table>')}" if customers else "")


def _verdict_row(verdict: Verdict) -> list[str]:
    return [_badge(verdict.outcome), f'{escape(verdict.line)} <span class="quiet">{escape(verdict.rule)}</span>']


def _badge(outcome: str) -> str:
    return f'<span class="{outcome}">{outcome}</span>'


def _measurements(report: Report) -> str:
    names = ("p50", "p90", "p95", "p99", "p99.9")
    rows = [
        [
            escape(item.subject),
            escape(" ".join(filter(None, (item.scenario, item.shape, item.variant)))),
            *[_number(item.percentiles[name].value if name in item.percentiles else None) for name in names],
            item.unit,
            str(len(item.samples)),
            "queue grew" if item.saturated else {True: "yes", False: "no", None: ""}[item.stable],
        ]
        for item in report.measurements
    ]
    columns = ["subject", "scenario", *names, "unit", "samples", "stable"]
    return _table(columns, rows, numbers=range(2, 7)) if rows else ""


def _comparisons(report: Report) -> str:
    rows = [
        [
            escape(item.subject),
            escape(f"{item.scenario} {item.batch}x{item.length or 'texts'} {item.statistic}"),
            _number(item.ratio.value),
            f"{item.ratio.low:.3f} to {item.ratio.high:.3f}",
            escape(item.baseline),
            {"none": "no difference", "less": "less", "more": "more"}[item.difference],
        ]
        for item in report.comparisons
    ]
    columns = ["subject", "measure", "ratio", "95 % interval", "to", "claimed"]
    return _table(columns, rows, numbers=(2, 3)) if rows else ""


def _accuracy(report: Report) -> str:
    rows = [
        [
            escape(item.subject),
            escape(item.customer),
            _number(item.accuracy),
            _number(item.base_accuracy),
            str(item.rows),
            escape(item.error),
        ]
        for item in report.accuracy
    ]
    return _table(["subject", "customer", "accuracy", "base", "rows", ""], rows, numbers=(2, 3, 4)) if rows else ""


def _subjects(report: Report) -> str:
    rows = [
        [
            escape(item.name),
            f"{item.kind}, {item.role}",
            item.precision,
            escape(item.provider),
            f"{item.size_bytes / 1e6:.1f} MB",
            f"{item.memory.host_peak_bytes / 1e6:.0f} MB" if item.memory is not None else "",
            f"{item.parity.max_abs_error:.1e}" if item.parity and item.parity.max_abs_error is not None else "",
            escape(item.digest[:12]),
        ]
        for item in report.subjects
    ]
    columns = ["subject", "kind", "precision", "provider", "size", "host peak", "parity error", "digest"]
    return _table(columns, rows, numbers=(4, 5, 6))


def _environment(report: Report) -> str:
    facts = {**report.environment.host, "TF32": "on" if report.environment.tf32 else "off"}
    facts |= {f"GPU {index}": ", ".join(gpu.values()) for index, gpu in enumerate(report.environment.gpus)}
    facts |= report.environment.versions
    return _table(["", ""], [[escape(name), escape(str(value))] for name, value in facts.items() if value is not None])


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def cell(tag: str, index: int, text: str) -> str:
        return f"<{tag}{' class=number' if index in right else ''}>{text}</{tag}>"

    head = "".join(cell("th", index, column) for index, column in enumerate(columns))
    body = "".join(f"<tr>{''.join(cell('td', index, text) for index, text in enumerate(row))}</tr>" for row in rows)
    return _wrap(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _wrap(table: str) -> str:
    return f'<div class="scroll">{table}</div>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
