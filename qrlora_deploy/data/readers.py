"""Tables of text from files: what is wrong with one row is told, with its number, and costs no other row."""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from qrlora_deploy.data.json_lines import read_objects
from qrlora_deploy.data.lines import lines_of
from qrlora_deploy.data.row_scan import check_rows, count_columns, header_of, marked_text, without_marks
from qrlora_deploy.data.tagged import names_of_tags, with_names
from qrlora_deploy.errors import InputError, first_line, library_errors

Columns = dict[str, Sequence[Any]]

Faults = dict[str, tuple[int, str]]
"""By customer, the first row of its that could not be read, and what is wrong with it."""

NOBODY = ""
"""Stands for the customer of a row whose id cannot be read, and of all rows where there is no such column."""

MAX_ROW_BYTES = 64 * 2**20
"""Of a row of CSV or TSV: Arrow parses blocks, of which each holds at least one row. Texts are cut at the model's
length anyway."""

MAX_COLUMNS = 10_000

NAME_NOT_TEXT = "{}: a column name is not UTF-8; save the file as UTF-8"


@dataclass(frozen=True)
class Table:
    """What a file or a data set holds.

    Attributes:
        columns: values by column name, of the rows that could be read. Names have no blanks at their ends.
        faults: by customer, what is wrong with the first of its rows that could not be read.
        converted: columns whose values were changed on the way here, "007" to 7 for one.
    """

    columns: Columns
    faults: dict[str, str] = field(default_factory=dict)
    converted: frozenset[str] = frozenset()


def read_table(path: Path, customer_column: str | None = None) -> Table:
    """Read a .tsv, .csv, .jsonl, .json or .parquet file.

    Args:
        path: the file. TSV is split on tabs only: a quotation mark is text.
        customer_column: whose cells say which customer a faulty row belongs to, or None.

    Raises:
        InputError: the file as a whole cannot be read, or has a column name twice.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{path}: unknown kind of data; give a .tsv, .csv, .jsonl or .parquet file")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        table = READERS[suffix](path, customer_column)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    names = unique_names(path, list(table.columns))
    return replace(table, columns=dict(zip(names, table.columns.values(), strict=True)))


def unique_names(path: Path, names: Sequence[str]) -> list[str]:
    """Names of columns without blanks at their ends.

    Raises:
        InputError: a name occurs twice, or there are too many.
    """
    if len(names) > MAX_COLUMNS:
        raise InputError(too_many_columns(path, len(names)))
    stripped = [name.strip() for name in names]
    twice = sorted(name for name, count in Counter(stripped).items() if count > 1)
    if twice:
        raise InputError(f"{path}: the column {', '.join(twice)} occurs twice")
    return stripped


def too_many_columns(path: Path, count: int) -> str:
    """What is said of a table with more columns than `MAX_COLUMNS`."""
    return f"{path} has {count} columns; {MAX_COLUMNS} are the most. Is the header missing?"


def _read_delimited(path: Path, customer_column: str | None) -> Table:
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is empty")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    is_text = check_rows(path, MAX_ROW_BYTES)
    if (count := count_columns(path, delimiter)) > MAX_COLUMNS:
        raise InputError(too_many_columns(path, count))
    # Bytes that are no text are written out, and their rows refused one by one: Arrow would refuse the file.
    content, mark = (None, "") if is_text else marked_text(path)
    buffer = None if content is None else pyarrow.py_buffer(content.encode())
    faults: Faults = {}
    passed_over: set[int] = set()
    names: list[str] = []

    def skip(row: Any) -> str:
        cells = row.text.split(delimiter)
        place = names.index(customer_column) if customer_column in names else len(cells)
        whose = cells[place].strip() if place < len(cells) else NOBODY
        cells_text = f"{row.actual_columns} column{'s' if row.actual_columns != 1 else ''}"
        passed_over.add(row.number - 1)
        found = f"has {cells_text} instead of {row.expected_columns}"
        faults.setdefault(without_marks(whose, mark) if mark else whose, (row.number - 1, found))
        return "skip"

    options: dict[str, Any] = {"quote_char": False, "double_quote": False} if delimiter == "\t" else {}
    parse = pyarrow.csv.ParseOptions(
        delimiter=delimiter, newlines_in_values=delimiter == ",", invalid_row_handler=skip, **options
    )
    # One thread, so that rows have their numbers.
    block = min((buffer.size if buffer else size) + 1, MAX_ROW_BYTES)
    read = pyarrow.csv.ReadOptions(use_threads=False, block_size=block)
    # Not by Arrow's reader in pieces: one that is closed early may leave a thread that aborts the process at its end.
    with _parsing(path):
        stored = header_of(buffer.to_pybytes() if buffer else path, delimiter)
    if mark and any(mark in name for name in stored):
        raise InputError(NAME_NOT_TEXT.format(path))
    other, suffix = (",", ".csv") if delimiter == "\t" else ("\t", ".tsv")
    if len(stored) == 1 and other in stored[0]:
        raise InputError(f"{path}: its header has {'commas' if other == ',' else 'tabs'}; name the file {suffix}")
    names += unique_names(path, stored)
    # Everything is text: a label "007", a text "NA" or "true" stay what they are.
    types = dict.fromkeys(stored, pyarrow.string())
    convert = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
    with _parsing(path):
        table = pyarrow.csv.read_csv(pyarrow.BufferReader(buffer) if buffer else path, read, parse, convert)
        if table.column_names != stored:
            raise InputError(f"{path}: its header cannot be read; write plain names with {delimiter!r} between them")
        columns = {name: table[name].to_pylist() for name in stored}
    found = Table(columns, _told(path, faults))
    return _without_marked(path, found, customer_column, mark, passed_over) if mark else found


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Around calls of Arrow that parse a file."""
    kind = path.suffix[1:].upper()
    with library_errors(f"{path} cannot be read as {kind}", InputError):
        try:
            yield
        except pyarrow.ArrowInvalid as error:
            if "block boundar" not in str(error):
                raise
            raise InputError(f"{path}: a row is longer than {MAX_ROW_BYTES // 2**20} MB; shorten it") from error
        except pyarrow.ArrowMemoryError as error:
            # A damaged file asks for any amount.
            raise InputError(f"{path} cannot be read as {kind}: {first_line(error)}") from error


def _without_marked(
    path: Path, table: Table, customer_column: str | None, mark: str, passed_over: Container[int]
) -> Table:
    """The rows in which nothing is marked as no text. The table has none of the rows `passed_over`."""
    broken = [any(mark in cell for cell in row) for row in zip(*table.columns.values(), strict=True)]
    numbers = (number for number in count(1) if number not in passed_over)
    return _without(path, table, customer_column, broken, lambda cell: without_marks(cell, mark), numbers)


def _without(
    path: Path,
    table: Table,
    customer_column: str | None,
    broken: list[bool],
    shown: Callable[[Any], str],
    numbers: Iterator[int],
) -> Table:
    """The rows that are not broken; of the others, by their `numbers`, it is told that they are not UTF-8."""
    faults: Faults = {}
    ids = next((values for name, values in table.columns.items() if name.strip() == customer_column), None)
    for row, (wrong, number) in enumerate(zip(broken, numbers, strict=False)):
        if wrong:
            whose = NOBODY if ids is None else shown(ids[row]).strip()
            faults.setdefault(whose, (number, "is not UTF-8"))
    columns: Columns = {
        name: [value for value, wrong in zip(values, broken, strict=True) if not wrong]
        for name, values in table.columns.items()
    }
    return Table(columns, _told(path, faults) | table.faults)


def _told(path: Path, faults: Faults) -> dict[str, str]:
    """What is said of each customer's first faulty row; the file is read once more for all of them together."""
    lines = lines_of(path, {row for row, _ in faults.values()})
    places = {row: f"{path} line {line}" for row, line in lines.items()}
    return {whose: f"{places.get(row, path)}: row {row} {wrong}" for whose, (row, wrong) in faults.items()}


def _read_json_lines(path: Path, _: str | None) -> Table:
    rows, fault = read_objects(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    unique_names(path, names)  # before a table of as many cells is made
    columns: Columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(columns, {NOBODY: fault} if fault else {})


def _read_parquet(path: Path, customer_column: str | None) -> Table:
    with _parsing(path):
        table = pyarrow.parquet.read_table(path)
    try:
        names = list(table.schema.names)
    except UnicodeDecodeError as error:
        raise InputError(NAME_NOT_TEXT.format(path)) from error
    unique_names(path, names)  # before a dict would drop one of two
    broken = [False] * table.num_rows
    columns: Columns = {}
    for name, column in zip(names, table.columns, strict=True):
        with _parsing(path):
            columns[name], wrong = _values(column)
        for row in wrong:
            broken[row] = True
    for name, names_of in names_of_tags(table.schema.metadata).items():
        if name in columns:
            columns[name] = with_names(columns[name], names_of)
    found = Table(columns)
    return _without(path, found, customer_column, broken, str, count(1)) if any(broken) else found


def _values(column: Any) -> tuple[list[Any], list[int]]:
    """The values of a column of Parquet, and the rows whose bytes are no text, which are written out."""
    try:
        return column.to_pylist(), []
    except UnicodeDecodeError:
        stored = column.cast(pyarrow.large_binary()).to_pylist()
    values = [None if value is None else value.decode(errors="backslashreplace") for value in stored]
    # What is text comes out of its bytes again.
    wrong = [row for row, value in enumerate(values) if value is not None and value.encode() != stored[row]]
    return values, wrong


READERS: dict[str, Callable[[Path, str | None], Table]] = {
    ".tsv": _read_delimited,
    ".csv": _read_delimited,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}
