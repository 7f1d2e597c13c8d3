"""Reading labelled text: TSV, CSV, JSON lines, Parquet, or a data set of the Hugging Face hub."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qrlora_deploy.data.labels import Label, column_labels, is_unicode, rows_text
from qrlora_deploy.data.lines import place_of
from qrlora_deploy.data.readers import READERS, Columns, Table, read_table, unique_names
from qrlora_deploy.errors import InputError, argument, library_errors

PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMNS = ("label", "labels")
SHOWN_COLUMNS = 12

HUB_NAME = re.compile(r"(?P<name>[\w\-][\w.\-]*(?:/[\w.\-]+)?)(?::(?P<config>[\w.\-]+))?")
"""`owner/name` or `owner/name:configuration`, such as `nyu-mll/glue:sst2`."""


@dataclass(frozen=True)
class Examples:
    """Labelled text as it was read, in the order of the file.

    Attributes:
        texts: the text of each row, or the first one of a pair.
        pairs: the second text of each row; None where the data has single texts.
        labels: as written in the data; a text is never empty, a list may be.
        name: file or hub name as it was given, for messages and records.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: Sequence[Label]
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
        texts: the text of each row, or the first one of a pair.
        pairs: the second text of each row; None where the data has single texts.
        name: file or hub name as it was given, for messages and records.
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
    return examples_of(str(source), _whole(_read(source, split)), text_column, label_column)


def read_texts(source: str | Path, text_column: str | None = None) -> TextRows:
    """Read the text of a file or hub data set, with labels or without.

    Raises:
        InputError: nothing can be read there, the columns are not those, a row is ragged, the text is not UTF-8, or
            there are no rows.
    """
    texts = _text_columns(str(source), _whole(_read(source, None)), text_column)
    return TextRows(texts[0], texts[1] if len(texts) == 2 else None, str(source))


def _read(source: str | Path, split: str | None) -> Table:
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder; give a .tsv, .csv, .jsonl or .parquet file")
    if path.is_file() and split is not None:
        raise InputError(f"{source} is a file and has no split {split!r}; splits are for hub data sets")
    if path.is_file() or path.suffix.lower() in READERS:
        return read_table(path)
    return _read_hub(str(source), split or "train")


def _whole(table: Table) -> Table:
    """A table of which every row could be read.

    Raises:
        InputError: one could not.
    """
    for fault in table.faults.values():
        raise InputError(fault)
    return table


def examples_of(source: str, table: Table, text_column: str | None, label_column: str | None) -> Examples:
    """Examples from a table that was read, as `read_examples` gives them.

    Args:
        source: what errors name, and the examples' name.
        table: the rows; its faults are not looked at.
        text_column: as in `read_examples`.
        label_column: as in `read_examples`.

    Raises:
        InputError: as `read_examples`, but for the file itself.
    """
    texts = _text_columns(source, table, text_column)
    name = label_name_of(source, table.columns, label_column)
    _check_as_stored(source, table, name)
    labels = column_labels(source, name, table.columns[name])
    return Examples(texts[0], texts[1] if len(texts) == 2 else None, labels, source)


def _text_columns(source: str, table: Table, text_column: str | None) -> list[list[str]]:
    """The one or two columns of text."""
    columns = table.columns
    if not columns or not len(next(iter(columns.values()))):
        raise InputError(f"{source} holds no rows")
    names = text_names(source, columns, text_column)
    for name in names:
        _check_as_stored(source, table, name)
    return [_texts(source, name, columns[name]) for name in names]


def _check_as_stored(source: str, table: Table, name: str) -> None:
    if name in table.converted:
        raise InputError(
            f"{source}: the column {name} holds values of several kinds or dates, which `datasets` changes "
            f'on reading ("007" becomes 7); give the file itself instead of its name on the hub'
        )


def text_names(source: str, columns: Columns, given: str | None) -> tuple[str, ...]:
    """The one or two columns of text.

    Raises:
        InputError: it is not clear which they are.
    """
    if given is not None:
        whole = given.strip()
        names = (whole,) if whole in columns else tuple(part.strip() for part in given.split(","))
        missing = [name for name in names if name not in columns]
        if missing or len(names) > 2:
            problem = f"no column {', '.join(missing)}" if missing else "more than two text columns"
            raise InputError(f"{source}: {problem} ({argument('text_column', given)}); it has {_listed(columns)}")
        return names
    for pair in PAIR_COLUMNS:
        if all(name in columns for name in pair):
            return pair
    for name in TEXT_COLUMNS:
        if name in columns:
            return (name,)
    raise InputError(
        f"{source}: which column is the text? It has {_listed(columns)}; name one by {argument('text_column')}"
    )


def label_name_of(source: str, columns: Columns, given: str | None) -> str:
    """The column of labels.

    Raises:
        InputError: it is not clear which it is.
    """
    for name in (given.strip(),) if given is not None else LABEL_COLUMNS:
        if name in columns:
            return name
    problem = f"no column {given} ({argument('label_column')})" if given else "which column is the label?"
    raise InputError(f"{source}: {problem} It has {_listed(columns)}; name one by {argument('label_column')}")


def _listed(columns: Columns) -> str:
    return ", ".join(list(columns)[:SHOWN_COLUMNS]) + (", ..." if len(columns) > SHOWN_COLUMNS else "")


def _texts(source: str, name: str, values: Sequence[Any]) -> list[str]:
    wrong = [row for row, value in enumerate(values, start=1) if not isinstance(value, str)]
    if wrong:
        verb = "has" if len(wrong) == 1 else "have"
        raise InputError(f"{place_of(source, wrong[0])}: {rows_text(wrong)} {verb} no text in the column {name}")
    broken = [row for row, value in enumerate(values, start=1) if not is_unicode(value)]
    if broken:
        place = place_of(source, broken[0])
        raise InputError(f"{place}: {rows_text(broken)}: the text is not valid Unicode (half a surrogate pair)")
    return list(values)


def _read_hub(source: str, split: str) -> Table:
    match = HUB_NAME.fullmatch(source)
    if match is None:
        raise InputError(f"{source}: no such file")
    # Imported here: most data are files, and it takes a second.
    import datasets

    what = f"{source} is neither a file nor a hub data set with a split {split!r} that can be read"
    with library_errors(what, InputError):
        data = datasets.load_dataset(match["name"], match["config"], split=split)
        columns = {name: data[name] for name in data.column_names}
    named = {name: _named(data.features[name], values) for name, values in columns.items()}
    converted = frozenset(name.strip() for name, feature in data.features.items() if _is_converted(feature))
    return Table(dict(zip(unique_names(Path(source), list(named)), named.values(), strict=True)), {}, converted)


def _is_converted(feature: Any) -> bool:
    """Whether the values of a column may be others than in the file: mixed ones of JSON, and texts like dates."""
    return type(feature).__name__ == "Json" or str(getattr(feature, "dtype", "")).startswith(("timestamp", "date"))


def _named(feature: Any, values: Sequence[Any]) -> list[Any]:
    names = getattr(feature, "names", None)
    if not isinstance(names, list):
        return list(values)
    # GLUE marks a missing label by -1.
    return [None if value is None or value < 0 else names[value] for value in values]
