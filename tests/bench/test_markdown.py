"""The tables and the Markdown of a report, and its documentation."""

import re
from pathlib import Path

from qrlora_deploy.bench.gate_file import (
    AccuracyRule,
    CapacityRule,
    LatencyRule,
    MemoryRule,
    ParityRule,
    SizeRule,
    ThroughputRule,
)
from qrlora_deploy.bench.markdown import render_markdown
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import SCENARIOS, Customer
from qrlora_deploy.bench.sections import sections
from tests.bench.fixed import good_report


def test_every_row_has_its_columns() -> None:
    made = sections(good_report())
    assert len(made) == 9 and len({section.title for section in made}) == 9
    for section in made:
        assert section.rows and all(len(row) == len(section.columns) for row in section.rows)


def test_missing_percentiles_say_what_they_need() -> None:
    latency = next(section for section in sections(good_report()) if section.title.startswith("Latency"))
    assert {row[6] for row in latency.rows} == {"500 of 3,688"}


def test_markdown_is_well_formed() -> None:
    report = good_report()
    text = render_markdown(report)
    assert text.startswith("## Benchmark: 2 subjects measured; no gate was given\n")
    assert text.count("<details>") == text.count("</details>") == 5
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 9
    assert all(len({line.count(" | ") for line in table}) == 1 for table in tables)


def test_names_cannot_become_markup() -> None:
    hostile = Customer(name="a|b", size_bytes=1, refused="<img src=x>\n# title")
    report = good_report().model_copy(update={"customers": [hostile], "notes": ["<b> `x`\n# y"]})
    text = render_markdown(report)
    assert "a\\|b" in text and "<b>" not in text and "\n# " not in text


def test_the_documentation_names_every_field_scenario_and_rule() -> None:
    text = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()
    names = set(Report.model_fields) - {"format", "format_version"} | set(SCENARIOS)
    names |= {
        name
        for rule in (LatencyRule, ThroughputRule, CapacityRule, AccuracyRule, ParityRule, SizeRule, MemoryRule)
        for name in rule.model_fields
        if name.startswith(("max", "min"))
    }
    assert {name for name in names if not re.search(rf"`[^`]*\b{name}\b[^`]*`", text)} == set()
