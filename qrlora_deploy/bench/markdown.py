"""A report as Markdown, for a pull request."""

from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.sections import Section, sections, verdict_line
from qrlora_deploy.errors import one_line

OPEN = 4
"""Tables that are shown at once; the others are folded."""

SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|~#"})


def render_markdown(report: Report) -> str:
    """The verdict first, then what a reviewer needs, then all else folded away."""
    tables = sections(report)
    parts = [f"## Benchmark: {_text(verdict_line(report))}"]
    if report.notes:
        parts.append("\n".join(f"- {_text(note)}" for note in report.notes))
    parts += [f"### {section.title}\n\n{_table(section)}" for section in tables[:OPEN]]
    parts += [
        f"<details><summary>{section.title}</summary>\n\n{_table(section)}\n\n</details>" for section in tables[OPEN:]
    ]
    return "\n\n".join(parts) + "\n"


def _table(section: Section) -> str:
    lines = [section.columns, tuple("---" if at < section.names else "---:" for at in range(len(section.columns)))]
    head = [_row(lines[0]), "| " + " | ".join(lines[1]) + " |"]
    return "\n".join(head + [_row(row) for row in section.rows])


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(_text, cells)) + " |"


def _text(value: str) -> str:
    """Names and messages come from files: nothing in them may become markup."""
    return one_line(value).translate(SPECIAL)
