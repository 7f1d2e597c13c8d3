"""The report of a benchmark as a file: JSON, format version 1. `docs/bench.md` describes the fields."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from qrlora_deploy.bench.report_parts import (
    Accuracy,
    Capacity,
    Comparison,
    Customer,
    Environment,
    Gate,
    Measurement,
    Settings,
    Subject,
)
from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.io.files import atomic_file
from qrlora_deploy.io.reading import parse_json, read_text
from qrlora_deploy.io.strict import Record, from_json
from qrlora_deploy.io.versions import Versions

FORMAT: Literal["qrlora-bench"] = "qrlora-bench"
VERSIONS = Versions(1, remedy="run bench again")
MAX_REPORT_BYTES = 2**30


class Report(Record):
    """Everything."""

    format: Literal["qrlora-bench"] = FORMAT
    format_version: Literal[1] = 1
    settings: Settings
    environment: Environment
    subjects: list[Subject] = Field(min_length=1)
    customers: list[Customer] = []
    measurements: list[Measurement] = []
    capacities: list[Capacity] = []
    comparisons: list[Comparison] = []
    accuracy: list[Accuracy] = []
    notes: list[str] = []
    gate: Gate | None = None

    def comparisons_of(self, item: Measurement, statistic: str) -> list[Comparison]:
        """Those of a statistic of one of the measurements, in order."""
        return [
            other
            for other in self.comparisons
            if (other.subject, other.statistic) == (item.subject, statistic)
            and (other.scenario, other.batch, other.length, other.variant) == item.key
        ]

    def of(self, scenario: str) -> Iterator[Measurement]:
        """The measurements of one scenario, in order."""
        return (item for item in self.measurements if item.scenario == scenario)


def write_report(report: Report, path: Path) -> None:
    """Write the report as JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(report.model_dump_json() + "\n", encoding="utf-8")


def is_report(path: Path) -> bool:
    """Whether a file is a report of `bench`, of any version."""
    try:
        record = parse_json(read_text(path, MAX_REPORT_BYTES), f"{path} is not JSON")
    except InputError:
        return False
    return isinstance(record, dict) and record.get("format") == FORMAT


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        InputError: it cannot be read.
        FileFormatError: it is no report of this version.
    """
    text = read_text(path, MAX_REPORT_BYTES)
    record = parse_json(text, f"{path} is not JSON")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FileFormatError(f"{path} is not a report of bench")
    what = f"{path} is not a report of bench"
    return from_json(Report, json.dumps(VERSIONS.upgraded(path, record, what)), what)
