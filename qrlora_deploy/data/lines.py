"""On which line of a file a row stands: rows are counted from 1 without the header and empty lines, lines from 1.

A file is read once more for it, so it is asked only where a row is wrong.
"""

import csv
from collections.abc import Collection, Iterator
from itertools import count
from pathlib import Path

DELIMITED = {".tsv": "\t", ".csv": ","}
LINES = (".jsonl", ".json")


def place_of(source: str, row: int) -> str:
    """Where a message sends its reader: `a.tsv line 7`, or the source alone where it has no lines.

    Args:
        source: file, or name of a data set.
        row: its number.
    """
    line = lines_of(Path(source), {row}).get(row)
    return source if line is None else f"{source} line {line}"


def row_of(source: str, row: int) -> str:
    """A row by the one place that finds it: `a.tsv line 7`, or `a data set: row 6` where there are no lines."""
    place = place_of(source, row)
    return f"{source}: row {row}" if place == source else place


def lines_of(path: Path, rows: Collection[int]) -> dict[int, int]:
    """The first line of each of these rows, by the number of the row; empty where that is not known."""
    suffix = path.suffix.lower()
    if not rows or suffix not in (*DELIMITED, *LINES):
        return {}
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            starts = _quoted_starts(text) if suffix == ".csv" else _starts(text)
            # The header is row 0.
            numbered = zip(count(1 if suffix in LINES else 0), starts)
            return {row: line for row, line in numbered if row in rows}
    except (OSError, ValueError, csv.Error):
        return {}


def _starts(text: Iterator[str]) -> Iterator[int]:
    return (number for number, line in enumerate(text, start=1) if line.strip("\r\n"))


def _quoted_starts(text: Iterator[str]) -> Iterator[int]:
    """As the lines of a CSV file, where a text in quotation marks may hold the ends of lines."""
    reader, start = csv.reader(text), 1
    for row in reader:
        if row:
            yield start
        start = reader.line_num + 1
