"""Which columns of a table are texts, labels, words and tags: those that were named, or common names."""

from collections.abc import Sequence
from typing import Any

from qrlora_deploy.data.readers import Columns
from qrlora_deploy.errors import InputError, argument

PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
    ("query", "passage"),
    ("anchor", "positive"),
)
TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMNS = ("label", "labels")
WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "ner_tags", *LABEL_COLUMNS)
SPAN_COLUMNS = ("spans", "entities")
SHOWN_COLUMNS = 12


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


def label_column_of(source: str, columns: Columns, text_column: str | None, label_column: str | None) -> str:
    """The column of labels, or of tags, of a table that has one of texts or words, too.

    Raises:
        InputError: it is not clear which columns they are.
    """
    tagged = tagged_columns(columns, text_column, label_column)
    if tagged is not None:
        return tagged[1]
    text_names(source, columns, text_column)
    return label_name_of(source, columns, label_column)


def tagged_columns(
    columns: Columns, text_column: str | None, label_column: str | None
) -> tuple[str | None, str] | None:
    """The columns of rows whose words have tags.

    Returns:
        The column of lists of words and that of their tags; or None and the column of lists of spans, beside a text.
        None alone where the texts have labels.
    """
    words = word_column(columns, text_column)
    if words is not None:
        names = TAG_COLUMNS if label_column is None else (label_column.strip(),)
        tags = next((name for name in names if name in columns and _has_lists(columns[name])), None)
        return None if tags is None else (words, tags)
    if label_column is None and any(name in columns for name in LABEL_COLUMNS):
        return None
    named = SPAN_COLUMNS if label_column is None else (label_column.strip(),)
    spans = next((name for name in named if name in columns and _has_spans(name, columns[name])), None)
    return None if spans is None else (None, spans)


def word_column(columns: Columns, given: str | None) -> str | None:
    """The column of lists of words: the one that was named, or a common name; None where there is none."""
    names = WORD_COLUMNS if given is None else (given.strip(),)
    return next((name for name in names if name in columns and _has_lists(columns[name])), None)


def _has_lists(values: Sequence[Any]) -> bool:
    return next((isinstance(value, list) for value in values if value is not None), False)


def _has_spans(name: str, values: Sequence[Any]) -> bool:
    lists = [value for value in values if isinstance(value, list)]
    elements = [element for value in lists for element in value]
    # Where no row has a span, the name alone tells it from a list of labels.
    return bool(lists) and (
        all(isinstance(element, dict) for element in elements) if elements else name in SPAN_COLUMNS
    )
