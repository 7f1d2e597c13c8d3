"""Rows of many customers in files, grouped by customer; what is wrong with one of them stops no other."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qrlora_deploy.data.columns import label_column_of
from qrlora_deploy.data.examples import Examples, examples_of, read_examples
from qrlora_deploy.data.labels import settled, text_of
from qrlora_deploy.data.readers import READERS, Columns, Table, read_table
from qrlora_deploy.errors import InputError, argument

Keeps = Callable[[str], bool]


@dataclass(frozen=True)
class Groups:
    """Examples by customer, and reasons by customer where there are none."""

    examples: dict[str, Examples] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def read_groups(
    place: Path,
    customer_column: str | None,
    text_column: str | None,
    label_column: str | None,
    keeps: Keeps,
    written: bool = False,
) -> Groups:
    """Read the rows of many customers.

    Args:
        place: a file or a folder, as in `FleetSource`.
        customer_column: name of the column of ids, or None.
        text_column: as in `read_examples`.
        label_column: as in `read_examples`.
        keeps: which customers are wanted.
        written: whether rows are prompts with answers.

    Raises:
        InputError: there is no such place, no data in it, a file with a column of ids cannot be read,
            or a file is given without that column.
    """
    if not place.is_dir() and not place.is_file():
        raise InputError(f"{place}: no such file or folder")
    if place.is_file() and customer_column is None:
        raise InputError(
            f"{place} is one file for all customers; name the column of their ids by {argument('customer_column')}"
        )
    files = [place] if place.is_file() else _files(place)
    if customer_column is None:
        return _one_file_each(files, text_column, label_column, keeps, written)
    column = customer_column.strip()
    table = _joined([(file, _read(file, column)) for file in files], place)
    columns = table.columns
    if not written:
        label = label_column_of(str(place), columns, text_column, label_column)
        # Before the rows are parted: what a number is written like may differ between customers.
        columns = columns | {label: settled(columns[label])}
    parts = _rows_by_customer(columns[column])
    clashes = _clashes(parts.keys() | table.faults.keys())
    groups = Groups(refused={name: text for name, text in (clashes | table.faults).items() if keeps(name)})
    for name, rows in parts.items():
        if not keeps(name) or name in groups.refused:
            continue
        part: Columns = {column: [values[row] for row in rows] for column, values in columns.items()}
        try:
            source = f"the rows of {name} in {place}"
            groups.examples[name] = examples_of(source, Table(part), text_column, label_column, written=written)
        except InputError as error:
            groups.refused[name] = str(error)
    return groups


def _files(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from error
    files = [path for path in found if path.suffix.lower() in READERS and not path.name.startswith(".")]
    if not files:
        raise InputError(f"{folder} holds no .tsv, .csv, .jsonl or .parquet file")
    return files


def _one_file_each(
    files: list[Path], text_column: str | None, label_column: str | None, keeps: Keeps, written: bool
) -> Groups:
    groups = Groups()
    by_name: dict[str, list[Path]] = {}
    for file in files:
        by_name.setdefault(file.stem, []).append(file)
    groups.refused.update({name: text for name, text in _clashes(by_name).items() if keeps(name)})
    for name, places in by_name.items():
        if not keeps(name) or name in groups.refused:
            continue
        try:
            if len(places) > 1:
                raise InputError(f"{' and '.join(path.name for path in places)} are the same customer; keep one")
            groups.examples[name] = read_examples(places[0], text_column, label_column, written=written)
        except InputError as error:
            groups.refused[name] = str(error)
    return groups


def _read(file: Path, customer_column: str) -> Table:
    table = read_table(file, customer_column)
    if not table.columns:
        for fault in table.faults.values():
            raise InputError(fault)  # of the one row or of all of them
    if customer_column not in table.columns:
        raise InputError(
            f"{file}: no column {customer_column} ({argument('customer_column')}); it has {', '.join(table.columns)}"
        )
    return table


def _joined(parts: list[tuple[Path, Table]], place: Path) -> Table:
    """The rows of several files, one file after another."""
    names = list(parts[0][1].columns)
    odd = [file.name for file, table in parts if set(table.columns) != set(names)]
    if odd:
        raise InputError(f"{place}: {odd[0]} has other columns than {parts[0][0].name}")
    columns: Columns = {name: [value for _, table in parts for value in table.columns[name]] for name in names}
    faults: dict[str, str] = {}
    for _, table in parts:
        faults = table.faults | faults
    if not columns[names[0]]:
        raise InputError(f"{place} holds no rows")
    return Table(columns, faults)


def _rows_by_customer(ids: Sequence[object]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(settled(ids)):
        rows.setdefault(_id(value), []).append(row)
    return rows


def _id(value: object) -> str:
    """A customer's id as text; empty where it is missing, as a NaN is. What is no single value is no id either,
    and refused as what it looks like."""
    try:
        return text_of(value)
    except InputError:
        return str(value).strip()


def _clashes(names: Iterable[str]) -> dict[str, str]:
    """By name, what is wrong with names that differ in case alone: on macOS and Windows they are one file."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.casefold(), []).append(name)
    return {
        name: f"{' and '.join(map(repr, sorted(several)))} differ in case alone, which are one file on macOS and "
        f"Windows; rename one"
        for several in alike.values()
        if len(several) > 1
        for name in several
    }
