"""The report as one HTML page that needs nothing beside itself: for a screen, a phone and paper."""

from html import escape

from qrlora_deploy.bench.plots import draw_figures
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.sections import Section, sections

FIRST = ("Verdicts", "Customers")
"""Tables above the figures."""

JUDGED = {"passed": "passed", "failed": "failed", "refused": "failed", "unknown": "unknown"}
"""Words that have a colour, by its class."""

CSS = """
:root { color-scheme: light dark; --ink: #1c2126; --paper: #ffffff; --faint: #c3c9cf; --soft: #f3f5f7;
  --good: #0a7a4b; --bad: #c0302b; --open: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #15181c; --faint: #4a525a; --soft: #1e2328;
    --good: #4cc38a; --bad: #ff7b72; --open: #e3b341; } }
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
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem;
  align-items: start; }
figure { margin: 0; padding: .8rem; background: var(--soft); border-radius: .6rem; }
figcaption { font-weight: 600; margin-bottom: .4rem; } figure svg { width: 100%; height: auto; display: block; }
@media (max-width: 44rem) {
  .verdicts thead { display: none; } .verdicts tr { display: block; border-bottom: 1px solid var(--faint); }
  .verdicts tbody { display: block; } .verdicts td { display: inline-block; border: 0; padding: .2rem .6rem 0 0; }
  .verdicts td:last-child { display: block; padding-bottom: .3rem; } }
ul { margin: .3rem 0; padding-left: 1.2rem; }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --faint: #bbb; --soft: #fff; --good: #064; --bad: #a00;
    --open: #850; }
  body { font-size: 10pt; padding: 0; max-width: none; } table { font-size: 7pt; }
  th, td { padding-right: .4rem; overflow-wrap: anywhere; } td.number, th.number { white-space: normal; }
  td:first-child, .verdicts td:nth-child(2) { overflow-wrap: normal; }
  .scroll { overflow: visible; } figure { padding: 0; }
  .figures { grid-template-columns: 1fr 1fr; } figure, tr, .card { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def render_page(report: Report) -> str:
    """The page, complete and without a script."""
    tables = sections(report)
    first = FIRST if report.gate is not None else ()
    figures = "".join(_figure(title, svg) for title, svg in draw_figures(report).items())
    parts = [
        _head(report),
        *[_section(table) for table in tables if table.title in first],
        f'<section><h2>Figures</h2><div class="figures">{figures}</div></section>' if figures else "",
        *[_section(table) for table in tables if table.title not in first],
    ]
    title = "Benchmark of " + ", ".join(subject.name for subject in report.subjects)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _figure(title: str, svg: str) -> str:
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return f"<figure><figcaption>{escape(title)}</figcaption>{named}</figure>"


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


def _section(table: Section) -> str:
    kind = table.title.split()[0].lower().rstrip(":")
    head = "".join(_cell("th", column, index >= table.names) for index, column in enumerate(table.columns))
    rows = "".join(
        f"<tr>{''.join(_cell('td', text, index >= table.names) for index, text in enumerate(row))}</tr>"
        for row in table.rows
    )
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="scroll"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _cell(tag: str, text: str, number: bool) -> str:
    """A cell; a word of judgement gets its colour."""
    classes = " ".join(filter(None, ("number" if number else "", JUDGED.get(text, "") if tag == "td" else "")))
    return f"<{tag} class='{classes}'>{escape(text)}</{tag}>" if classes else f"<{tag}>{escape(text)}</{tag}>"
