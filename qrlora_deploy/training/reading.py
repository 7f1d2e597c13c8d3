"""Tables of text from files: what is wrong with one row is told, with its number, and costs no other row."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from qrlora_deploy.errors import InputError, library_errors
from qrlora_deploy.training.json_lines import read_objects

Columns = dict[str, Sequence[Any]]

NOBODY = ""
"""Stands for the customer of a row whose id cannot be read, and of all rows where there is no such column."""

MAX_ROW_BYTES = 64 * 2**20
"""Of a row of CSV or TSV: Arrow parses blocks, of which each holds at least one row. Texts are cut at the model's
length anyway."""

MAX_COLUMNS = 10_000


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
        raise InputError(f"{path} has {len(names)} columns; {MAX_COLUMNS} are the most. Is the header missing?")
    stripped = [name.strip() for name in names]
    twice = sorted(name for name, count in Counter(stripped).items() if count > 1)
    if twice:
        raise InputError(f"{path}: the column {', '.join(twice)} occurs twice")
    return stripped


def _read_delimited(path: Path, customer_column: str | None) -> Table:
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is empty")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    faults: dict[str, str] = {}
    names: list[str] = []

    def skip(row: Any) -> str:
        cells = row.text.split(delimiter)
        place = names.index(customer_column) if customer_column in names else len(cells)
        whose = cells[place].strip() if place < len(cells) else NOBODY
        found = f"row {row.number - 1} has {row.actual_columns} columns instead of {row.expected_columns}"
        faults.setdefault(whose, f"{path}: {found}")
        return "skip"

    options: dict[str, Any] = {"quote_char": False, "double_quote": False} if delimiter == "\t" else {}
    parse = pyarrow.csv.ParseOptions(
        delimiter=delimiter, newlines_in_values=delimiter == ",", invalid_row_handler=skip, **options
    )
    # One thread, so that rows have their numbers.
    read = pyarrow.csv.ReadOptions(use_threads=False, block_size=min(size + 1, MAX_ROW_BYTES))
    with _parsing(path), pyarrow.csv.open_csv(path, read, parse) as reader:
        schema = reader.schema
    stored = _names_of(path, schema)
    names += unique_names(path, stored)
    faults.clear()  # of rows that were looked at before the columns were known
    # Bytes, which are decoded row by row: as text, one wrong byte would cost the file. And everything is
    # text: a label "007", a text "NA" or "true" stay what they are.
    types = dict.fromkeys(stored, pyarrow.binary())
    convert = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
    with _parsing(path):
        table = pyarrow.csv.read_csv(path, read, parse, convert)
    try:
        # Usually all of it is text, and Arrow decodes a column at once.
        return Table({name: table[name].cast(pyarrow.string()).to_pylist() for name in stored}, faults)
    except pyarrow.ArrowInvalid:
        return _decoded(path, Table(table.to_pydict(), faults), customer_column)


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


def _decoded(path: Path, table: Table, customer_column: str | None) -> Table:
    """The same as text; rows that are none are left out."""
    names, faults = list(table.columns), dict(table.faults)
    kept: list[list[str]] = []
    for number, row in enumerate(zip(*table.columns.values(), strict=True), start=1):
        try:
            kept.append([value.decode() for value in row])
        except UnicodeDecodeError:
            cells = {name.strip(): value for name, value in zip(names, row, strict=True)}
            whose = cells.get(customer_column or "", b"").decode(errors="backslashreplace").strip()
            faults.setdefault(whose, f"{path}: row {number} is not UTF-8")
    columns = [list(column) for column in zip(*kept, strict=True)] or [[] for _ in names]
    return Table(dict(zip(names, columns, strict=True)), faults)


def _read_json_lines(path: Path, _: str | None) -> Table:
    rows, fault = read_objects(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: Columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(columns, {NOBODY: fault} if fault else {})


def _read_parquet(path: Path, _: str | None) -> Table:
    with _parsing(path):
        table = pyarrow.parquet.read_table(path)
    names = _names_of(path, table.schema)
    unique_names(path, names)  # before a dict would drop one of two
    with _parsing(path):
        values = [column.to_pylist() for column in table.columns]
    return Table(dict(zip(names, values, strict=True)))


def _names_of(path: Path, schema: Any) -> list[str]:
    try:
        return list(schema.names)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a column name is not UTF-8; save the file as UTF-8") from error


READERS: dict[str, Callable[[Path, str | None], Table]] = {
    ".tsv": _read_delimited,
    ".csv": _read_delimited,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}
