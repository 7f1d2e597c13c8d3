"""Rows of many customers in files, grouped by customer; what is wrong with one of them stops no other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow

from qrlora_deploy.errors import InputError, first_line
from qrlora_deploy.training.data import (
    READERS,
    Columns,
    Examples,
    examples_of,
    label_name_of,
    read_examples,
    text_names,
)
from qrlora_deploy.training.fleet.tolerant import Read, read_rows

Keeps = Callable[[str], bool]


@dataclass(frozen=True)
class Groups:
    """Examples by customer, and reasons by customer where there are none."""

    examples: dict[str, Examples] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def read_groups(
    place: Path, customer_column: str | None, text_column: str | None, label_column: str | None, keeps: Keeps
) -> Groups:
    """Read the rows of many customers.

    Args:
        place: a file or a folder, as in `FleetSource`.
        customer_column: name of the column of ids, or None.
        text_column: as in `read_examples`.
        label_column: as in `read_examples`.
        keeps: which customers are wanted.

    Raises:
        InputError: there is no such place, no data in it, a file with a column of ids cannot be read,
            or a file is given without that column.
    """
    if not place.is_dir() and not place.is_file():
        raise InputError(f"{place}: no such file or folder")
    if place.is_file() and customer_column is None:
        raise InputError(f"{place} is one file for all customers; name the column of their ids by --customer-column")
    files = [place] if place.is_file() else _files(place)
    if customer_column is None:
        return _one_file_each(files, text_column, label_column, keeps)
    read = _joined([(file, _read(file, customer_column)) for file in files], place)
    text_names(str(place), read.columns, text_column)
    label_name_of(str(place), read.columns, label_column)
    groups = Groups(refused={name: reason for name, reason in read.faults.items() if keeps(name)})
    for name, rows in _rows_by_customer(read.columns[customer_column], keeps).items():
        if name in groups.refused:
            continue
        part: Columns = {column: [values[row] for row in rows] for column, values in read.columns.items()}
        try:
            groups.examples[name] = examples_of(f"{name} in {place}", part, text_column, label_column)
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


def _one_file_each(files: list[Path], text_column: str | None, label_column: str | None, keeps: Keeps) -> Groups:
    groups = Groups()
    by_name: dict[str, list[Path]] = {}
    for file in files:
        by_name.setdefault(file.stem, []).append(file)
    for name, places in by_name.items():
        if not keeps(name):
            continue
        try:
            if len(places) > 1:
                raise InputError(f"{' and '.join(path.name for path in places)} are the same customer; keep one")
            groups.examples[name] = read_examples(places[0], text_column, label_column)
        except InputError as error:
            groups.refused[name] = str(error)
    return groups


def _read(file: Path, customer_column: str) -> Read:
    try:
        return read_rows(file, customer_column)
    except pyarrow.ArrowException as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or first_line(error)}") from error


def _joined(parts: list[tuple[Path, Read]], place: Path) -> Read:
    """The rows of several files, one file after another."""
    names = list(parts[0][1].columns)
    odd = [file.name for file, read in parts if set(read.columns) != set(names)]
    if odd:
        raise InputError(f"{place}: {odd[0]} has other columns than {parts[0][0].name}")
    columns: Columns = {name: [value for _, read in parts for value in read.columns[name]] for name in names}
    faults: dict[str, str] = {}
    for _, read in parts:
        faults = read.faults | faults
    if not columns[names[0]]:
        raise InputError(f"{place} holds no rows")
    return Read(columns, faults)


def _rows_by_customer(ids: Sequence[object], keeps: Keeps) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(ids):
        rows.setdefault("" if value is None else str(value).strip(), []).append(row)
    return {name: numbers for name, numbers in rows.items() if keeps(name)}
