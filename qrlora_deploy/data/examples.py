"""Reading labelled text: TSV, CSV, JSON lines, Parquet, or a data set of the Hugging Face hub."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qrlora_deploy.data.columns import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    label_name_of,
    tagged_columns,
    text_names,
    word_column,
)
from qrlora_deploy.data.labels import Label, column_labels, is_unicode, rows_text
from qrlora_deploy.data.lines import place_of
from qrlora_deploy.data.readers import READERS, Table, read_table, unique_names
from qrlora_deploy.data.tagged import read_words, tags_of_spans, tags_of_words
from qrlora_deploy.data.turns import Turns, read_turns, turn_columns
from qrlora_deploy.errors import InputError, argument, library_errors
from qrlora_deploy.tokenization.words import Place, joined

HUB_NAME = re.compile(r"(?P<name>[\w\-][\w.\-]*(?:/[\w.\-]+)?)(?::(?P<config>[\w.\-]+))?")
"""`owner/name` or `owner/name:configuration`, such as `nyu-mll/glue:sst2`."""


@dataclass(frozen=True)
class Examples:
    """Labelled text as it was read, in the order of the file.

    Attributes:
        texts: the text of each row, or the first one of a pair.
        pairs: the second text of each row; None where the data has single texts.
        labels: as written in the data; a text is never empty, a list may be. Of tagged words a tag for each; empty
            texts where there is no column of them.
        name: file or hub name as it was given, for messages and records.
        words: the places of each row's words, where the words have tags; None where the texts have labels.
        turns: of each row, where rows are prompts with completions or chats, whose texts and labels are empty.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: Sequence[Label]
    name: str
    words: list[tuple[Place, ...]] | None = None
    turns: Sequence[Turns] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over texts, pairs and labels; the same rows in another file format agree."""
        digest = hashlib.sha256()
        pairs: Sequence[str | None] = self.pairs or [None] * len(self.texts)
        for row in zip(self.texts, pairs, self.labels, strict=True):
            digest.update(json.dumps(row).encode())
        for places in self.words or ():
            digest.update(json.dumps(places).encode())
        for turns in self.turns or ():
            digest.update(json.dumps([[turn.role, turn.content] for turn in turns]).encode())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> "Examples":
        """Some of the rows, by their numbers from 0."""
        return replace(
            self,
            texts=[self.texts[row] for row in rows],
            pairs=None if self.pairs is None else [self.pairs[row] for row in rows],
            labels=[self.labels[row] for row in rows],
            words=None if self.words is None else [self.words[row] for row in rows],
            turns=None if self.turns is None else [self.turns[row] for row in rows],
        )


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
    source: str | Path,
    text_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    labelled: bool = True,
    written: bool = False,
) -> Examples:
    """Read labelled text, or prompts and answers.

    Args:
        source: a .tsv, .csv, .jsonl (or .json, one object a line) or .parquet file with named
            columns, or a hub data set, `owner/name` or `owner/name:configuration`. TSV is split
            on tabs only: a quotation mark is text.
        text_column: the column of the text, or two with a comma between them for pairs. GLUE's
            names, `text` and `sentence` are found without it.
        label_column: the column of the labels; `label` and `labels` are found without it.
        split: the part of a hub data set, "train" if not given.
        labelled: whether there must be labels; else pairs of texts may have no column of them: theirs are empty.
        written: whether rows must be prompts with completions, or chats. Else they are taken for these where there is
            a column `messages`, or `prompt` and `completion` without a label.

    Raises:
        InputError: nothing can be read there, the columns are not those, a row is ragged or has no
            label, the text is not UTF-8, or there are no rows.
    """
    return examples_of(str(source), _whole(_read(source, split)), text_column, label_column, labelled, written)


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


def examples_of(
    source: str,
    table: Table,
    text_column: str | None,
    label_column: str | None,
    labelled: bool = True,
    written: bool = False,
) -> Examples:
    """Examples from a table that was read, as `read_examples` gives them.

    Args:
        source: what errors name, and the examples' name.
        table: the rows; its faults are not looked at.
        text_column: as in `read_examples`.
        label_column: as in `read_examples`.
        labelled: as in `read_examples`.
        written: as in `read_examples`.

    Raises:
        InputError: as `read_examples`, but for the file itself.
    """
    named = turn_columns(source, table.columns, text_column, label_column, written)
    if named:
        _check_rows(source, table)
        turns = read_turns(source, named, table.columns)
        return Examples([""] * len(turns), None, [""] * len(turns), source, turns=turns)
    tagged = _tagged_examples(source, table, text_column, label_column)
    if tagged is not None:
        return tagged
    texts = _text_columns(source, table, text_column)
    if not labelled and label_column is None and len(texts) == 2 and not set(LABEL_COLUMNS) & table.columns.keys():
        return Examples(texts[0], texts[1], [""] * len(texts[0]), source)
    name = label_name_of(source, table.columns, label_column)
    _check_as_stored(source, table, name)
    labels = column_labels(source, name, table.columns[name])
    return Examples(texts[0], texts[1] if len(texts) == 2 else None, labels, source)


def _tagged_examples(source: str, table: Table, text_column: str | None, label_column: str | None) -> Examples | None:
    """Rows whose words have tags; None where the texts have labels."""
    names, columns = tagged_columns(table.columns, text_column, label_column), table.columns
    if names is None:
        return None
    words, tags = names
    if words is not None:
        rows = tags_of_words(source, (words, tags), columns[words], columns[tags])
    else:
        texts = _text_columns(source, table, text_column)
        if len(texts) > 1:
            raise InputError(
                f"{source}: tags belong to the words of one text, not of a pair; name it by {argument('text_column')}"
            )
        rows = tags_of_spans(source, tags, texts[0], columns[tags])
    return Examples([row[0] for row in rows], None, [row[2] for row in rows], source, [row[1] for row in rows])


def _text_columns(source: str, table: Table, text_column: str | None) -> list[list[str]]:
    """The one or two columns of text."""
    columns = table.columns
    _check_rows(source, table)
    words = word_column(columns, text_column)
    if words is not None and (text_column is not None or not any(name in columns for name in TEXT_COLUMNS)):
        return [[joined(row)[0] for row in read_words(source, words, columns[words])]]
    names = text_names(source, columns, text_column)
    for name in names:
        _check_as_stored(source, table, name)
    return [_texts(source, name, columns[name]) for name in names]


def _check_rows(source: str, table: Table) -> None:
    if not table.columns or not len(next(iter(table.columns.values()))):
        raise InputError(f"{source} holds no rows")


def _check_as_stored(source: str, table: Table, name: str) -> None:
    if name in table.converted:
        raise InputError(
            f"{source}: the column {name} holds values of several kinds or dates, which `datasets` changes "
            f'on reading ("007" becomes 7); give the file itself instead of its name on the hub'
        )


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
        inner = getattr(feature, "feature", None)  # of a list, such as one of tags
        if not isinstance(getattr(inner, "names", None), list):
            return list(values)
        return [None if value is None else _named(inner, value) for value in values]
    # GLUE marks a missing label by -1.
    return [None if value is None or value < 0 else names[value] for value in values]
