"""Reading a file of many customers' rows so that a broken row costs one customer and not the file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.csv

from qrlora_deploy.errors import InputError
from qrlora_deploy.training.data import READERS, Columns

NOBODY = ""
"""Stands for the customer of rows whose id cannot be read."""


@dataclass(frozen=True)
class Read:
    """What a file holds.

    Attributes:
        columns: values by column, of the rows that could be read.
        faults: by customer, what is wrong with the first of its rows that could not.
    """

    columns: Columns
    faults: dict[str, str] = field(default_factory=dict)


def read_rows(path: Path, customer_column: str) -> Read:
    """Read a .tsv, .csv, .jsonl, .json or .parquet file as `read_examples` does, row by row.

    Raises:
        InputError: the file as a whole cannot be read, or has no such column.
        OSError, pyarrow.ArrowException: from the libraries, likewise.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{path}: unknown kind of data; give a .tsv, .csv, .jsonl or .parquet file")
    if suffix in (".tsv", ".csv"):
        read = _read_delimited(path, customer_column)
    elif suffix in (".jsonl", ".json"):
        read = _read_json_lines(path, customer_column)
    else:
        read = Read(READERS[suffix](path))
    if customer_column not in read.columns:
        raise InputError(f"{path}: no column {customer_column} (--customer-column); it has {', '.join(read.columns)}")
    return read


def _read_delimited(path: Path, customer_column: str) -> Read:
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    faults: dict[str, str] = {}
    names: list[str] = []

    def skip(row: Any) -> str:
        found = f"row {row.number - 1} has {row.actual_columns} columns instead of {row.expected_columns}"
        cells = row.text.split(delimiter)
        place = names.index(customer_column) if customer_column in names else len(cells)
        faults.setdefault(cells[place].strip() if place < len(cells) else NOBODY, f"{path}: {found}")
        return "skip"

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    options: dict[str, Any] = {"quote_char": False, "double_quote": False} if delimiter == "\t" else {}
    parse = pyarrow.csv.ParseOptions(
        delimiter=delimiter, newlines_in_values=delimiter == ",", invalid_row_handler=skip, **options
    )
    # One thread, so that rows have their numbers.
    read = pyarrow.csv.ReadOptions(use_threads=False)
    with pyarrow.csv.open_csv(path, read, parse) as reader:
        names += reader.schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: the column {', '.join(twice)} occurs twice")
    faults.clear()  # of rows that were looked at before the columns were known
    # Bytes, which are decoded row by row: as text, one wrong byte would cost the file.
    types = dict.fromkeys(names, pyarrow.binary())
    convert = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
    table = pyarrow.csv.read_csv(path, read, parse, convert)
    try:
        # Usually all of it is text, and Arrow decodes a column at once.
        return Read({name: table[name].cast(pyarrow.string()).to_pylist() for name in names}, faults)
    except pyarrow.ArrowInvalid:
        return _decoded(path, Read(table.to_pydict(), faults), customer_column)


def _decoded(path: Path, read: Read, customer_column: str) -> Read:
    """The same as text; rows that are none are left out."""
    names, faults = list(read.columns), dict(read.faults)
    kept: list[list[str]] = []
    for number, row in enumerate(zip(*read.columns.values(), strict=True), start=1):
        try:
            kept.append([value.decode() for value in row])
        except UnicodeDecodeError:
            whose = dict(zip(names, row, strict=True)).get(customer_column, b"")
            faults.setdefault(whose.decode(errors="backslashreplace").strip(), f"{path}: row {number} is not UTF-8")
    columns = [list(column) for column in zip(*kept, strict=True)] or [[] for _ in names]
    return Read(dict(zip(names, columns, strict=True)), faults)


def _read_json_lines(path: Path, customer_column: str) -> Read:
    rows: list[dict[str, Any]] = []
    faults: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None:
            faults.setdefault(NOBODY, f"{path}: line {number} is no JSON object in UTF-8")
        else:
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Read({name: [row.get(name) for row in rows] for name in names}, faults)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
