"""Reading labelled text: TSV, CSV, JSON lines, Parquet, or a data set of the Hugging Face hub."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from qrlora_deploy.errors import InputError, first_line

PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMNS = ("label", "labels")

HUB_NAME = re.compile(r"(?P<name>[\w\-][\w.\-]*(?:/[\w.\-]+)?)(?::(?P<config>[\w.\-]+))?")
"""`owner/name` or `owner/name:configuration`, such as `nyu-mll/glue:sst2`."""

Columns = dict[str, Sequence[Any]]


@dataclass(frozen=True)
class Examples:
    """Labelled text as it was read, in the order of the file.

    Attributes:
        texts: the text of each row, or the first one of a pair.
        pairs: the second text of each row; None where the data has single texts.
        labels: as written in the data; none is empty.
        name: file or hub name as it was given, for messages and records.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    name: str

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over texts, pairs and labels; the same rows in another file format agree."""
        digest = hashlib.sha256()
        pairs: Sequence[str | None] = self.pairs or [None] * len(self.texts)
        for row in zip(self.texts, pairs, self.labels, strict=True):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class TextRows:
    """Text without labels, in the order of the file; at least one row.

    Attributes:
        texts, pairs, name: as of `Examples`.
    """

    texts: list[str]
    pairs: list[str] | None
    name: str


def check_alike(train: Examples, evaluation: Examples | None) -> None:
    """Make sure that held-out examples are of the kind of those that are trained on.

    Raises:
        InputError: one of them holds pairs of texts.
    """
    if evaluation is not None and (evaluation.pairs is None) != (train.pairs is None):
        raise InputError(f"{train.name} and {evaluation.name}: one holds pairs of texts, the other single ones")


def read_examples(
    source: str | Path, text_column: str | None = None, label_column: str | None = None, split: str | None = None
) -> Examples:
    """Read labelled text.

    Args:
        source: a .tsv, .csv, .jsonl (or .json, one object a line) or .parquet file with named
            columns, or a hub data set, `owner/name` or `owner/name:configuration`. TSV is split
            on tabs only: a quotation mark is text.
        text_column: the column of the text, or two with a comma between them for pairs. GLUE's
            names, `text` and `sentence` are found without it.
        label_column: the column of the labels; `label` and `labels` are found without it.
        split: the part of a hub data set, "train" if not given.

    Raises:
        InputError: nothing can be read there, the columns are not those, a row is ragged or has no
            label, the text is not UTF-8, or there are no rows.
    """
    return examples_of(str(source), _read_columns(source, split), text_column, label_column)


def read_texts(source: str | Path, text_column: str | None = None) -> TextRows:
    """Read the text of a file or hub data set, with labels or without.

    Raises:
        As `read_examples`, but for what it says of labels.
    """
    texts = _text_columns(str(source), _read_columns(source, None), text_column)
    return TextRows(texts[0], texts[1] if len(texts) == 2 else None, str(source))


def _read_columns(source: str | Path, split: str | None) -> Columns:
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder; give a .tsv, .csv, .jsonl or .parquet file")
    reader = READERS.get(path.suffix.lower())
    if path.is_file() and reader is None:
        raise InputError(f"{source}: unknown kind of data; give a .tsv, .csv, .jsonl or .parquet file")
    if path.is_file() and split is not None:
        raise InputError(f"{source} is a file and has no split {split!r}; splits are for hub data sets")
    try:
        if reader is not None:
            if not path.is_file():
                raise InputError(f"{source}: no such file")
            return reader(path)
        return _read_hub(str(source), split or "train")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read as {path.suffix[1:].upper()}: {first_line(error)}") from error
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror or first_line(error)}") from error


def examples_of(source: str, columns: Columns, text_column: str | None, label_column: str | None) -> Examples:
    """Examples from columns that were read, as `read_examples` gives them.

    Args:
        source: what errors name, and the examples' name.
        columns: values by column.
        text_column: as in `read_examples`.
        label_column: as in `read_examples`.

    Raises:
        InputError: as `read_examples`, but for the file itself.
    """
    texts = _text_columns(source, columns, text_column)
    label_name = label_name_of(source, columns, label_column)
    labels = [_label(value) for value in columns[label_name]]
    empty = [row for row, label in enumerate(labels, start=1) if not label]
    if empty:
        raise InputError(f"{source}: {_rows(empty)} no {label_name}; every example needs one")
    return Examples(texts[0], texts[1] if len(texts) == 2 else None, labels, source)


def _text_columns(source: str, columns: Columns, text_column: str | None) -> list[list[str]]:
    """The one or two columns of text."""
    if not columns or not len(next(iter(columns.values()))):
        raise InputError(f"{source} holds no rows")
    return [_texts(source, name, columns[name]) for name in text_names(source, columns, text_column)]


def text_names(source: str, columns: Columns, given: str | None) -> tuple[str, ...]:
    """The one or two columns of text.

    Raises:
        InputError: it is not clear which they are.
    """
    if given is not None:
        names = (given,) if given in columns else tuple(part.strip() for part in given.split(","))
        missing = [name for name in names if name not in columns]
        if missing or len(names) > 2:
            problem = f"no column {', '.join(missing)}" if missing else "more than two text columns"
            raise InputError(f"{source}: {problem} (--text-column {given}); it has {', '.join(columns)}")
        return names
    for pair in PAIR_COLUMNS:
        if all(name in columns for name in pair):
            return pair
    for name in TEXT_COLUMNS:
        if name in columns:
            return (name,)
    raise InputError(f"{source}: which column is the text? It has {', '.join(columns)}; name one by --text-column")


def label_name_of(source: str, columns: Columns, given: str | None) -> str:
    """The column of labels.

    Raises:
        InputError: it is not clear which it is.
    """
    for name in (given,) if given is not None else LABEL_COLUMNS:
        if name in columns:
            return name
    problem = f"no column {given} (--label-column)" if given else "which column is the label?"
    raise InputError(f"{source}: {problem} It has {', '.join(columns)}; name one by --label-column")


def _texts(source: str, name: str, values: Sequence[Any]) -> list[str]:
    wrong = [row for row, value in enumerate(values, start=1) if not isinstance(value, str)]
    if wrong:
        raise InputError(f"{source}: {_rows(wrong)} no text in the column {name}")
    return list(values)


def _label(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _rows(rows: list[int]) -> str:
    shown = ", ".join(str(row) for row in rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    return f"row {shown} has" if len(rows) == 1 else f"rows {shown} have"


def _read_delimited(path: Path, parse: pyarrow.csv.ParseOptions) -> Columns:
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    # One thread, so that an error names its row.
    read = pyarrow.csv.ReadOptions(use_threads=False)
    with pyarrow.csv.open_csv(path, read, parse) as reader:
        names = _unique(path, reader.schema.names)
    # Everything is text: a label "007", a text "NA" or "true" stay what they are.
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False)
    return pyarrow.csv.read_csv(path, read, parse, convert).to_pydict()


def _read_tsv(path: Path) -> Columns:
    return _read_delimited(path, pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False))


def _read_csv(path: Path) -> Columns:
    return _read_delimited(path, pyarrow.csv.ParseOptions(newlines_in_values=True))


def _read_json_lines(path: Path) -> Columns:
    # Not pyarrow.json: it turns a text that looks like a date into a timestamp.
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is not a JSON object; one object a line is read")
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> Columns:
    table = pyarrow.parquet.read_table(path)
    _unique(path, table.column_names)
    return table.to_pydict()


def _unique(path: Path, names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: the column {', '.join(twice)} occurs twice")
    return names


def _read_hub(source: str, split: str) -> Columns:
    match = HUB_NAME.fullmatch(source)
    if match is None:
        raise InputError(f"{source}: no such file")
    # Imported here: most data are files, and it takes a second.
    import datasets

    try:
        data = datasets.load_dataset(match["name"], match["config"], split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{source} is neither a file nor a hub data set with a split {split!r} that can be read: "
            f"{first_line(error)}"
        ) from error
    return {name: _named(data.features[name], data[name]) for name in data.column_names}


def _named(feature: Any, values: Sequence[Any]) -> list[Any]:
    names = getattr(feature, "names", None)
    if not isinstance(names, list):
        return list(values)
    # GLUE marks a missing label by -1.
    return [None if value is None or value < 0 else names[value] for value in values]


READERS: dict[str, Callable[[Path], Columns]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}
