"""Rows whose words have tags: lists of words and tags, or texts with spans of characters."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qrlora_deploy.data.labels import is_unicode, text_of
from qrlora_deploy.data.lines import row_of
from qrlora_deploy.errors import InputError, shortened
from qrlora_deploy.tokenization.words import Place, joined, words_of

SPAN_KEYS = ("start", "end", "label")

OUTSIDE = "O"

Tagged = tuple[str, tuple[Place, ...], tuple[str, ...]]
"""A text, the places of its words, and a tag for each."""


def names_of_tags(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of numbers in columns of lists, as `datasets` notes them beside the columns of a Parquet file.

    Args:
        metadata: of the file's schema; notes that cannot be read are none.
    """
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        inner = {name: feature.get("feature") for name, feature in features.items()}
        found = {name: feature.get("names") for name, feature in inner.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {name: names for name, names in found.items() if isinstance(names, list)}


def with_names(values: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """A column of lists with names for the numbers in them; what has no name stays."""
    known = dict(enumerate(names))
    return [
        [known.get(tag, tag) if type(tag) is int else tag for tag in value] if isinstance(value, list) else value
        for value in values
    ]


def read_words(source: str, name: str, values: Sequence[Any]) -> list[tuple[str, ...]]:
    """The words of each row.

    Args:
        source: what errors name.
        name: of the column.
        values: as a reader gave them.

    Raises:
        InputError: a row has no list of words, or a word is empty or no text; the row is named.
    """
    found = []
    for row, value in enumerate(values, start=1):
        if not isinstance(value, list) or not value:
            raise _wrong(source, row, f"has no list of words in the column {name}: {_shown(value)}")
        if not all(isinstance(word, str) and word.strip() and is_unicode(word) for word in value):
            raise _wrong(source, row, f"has a word in the column {name} that is empty or no text: {_shown(value)}")
        found.append(tuple(word.strip() for word in value))
    return found


def tags_of_words(source: str, names: tuple[str, str], words: Sequence[Any], tags: Sequence[Any]) -> list[Tagged]:
    """Rows of words and as many tags; the text of a row is its words with a blank between them.

    Args:
        source: what errors name.
        names: of both columns.
        words: lists, as a reader gave them.
        tags: lists, as a reader gave them.

    Raises:
        InputError: a row has another number of tags than of words, or a tag is no name; the row is named.
    """
    found = []
    for row, (own, given) in enumerate(zip(read_words(source, names[0], words), tags, strict=True), start=1):
        if not isinstance(given, list) or len(given) != len(own):
            count = len(given) if isinstance(given, list) else "no"
            raise _wrong(source, row, f"has {len(own)} {names[0]} but {count} {names[1]}; every word needs one tag")
        found.append((*joined(own), tuple(_name(source, row, tag) for tag in given)))
    return found


def tags_of_spans(source: str, name: str, texts: Sequence[str], spans: Sequence[Any]) -> list[Tagged]:
    """Rows of a text and spans of its characters, as tags of IOB2 on its words.

    Words are parted at the borders of spans, so that no span takes more of a text than it says.

    Args:
        source: what errors name.
        name: of the column of spans.
        texts: of each row.
        spans: lists of `{start, end, label}`, as a reader gave them.

    Raises:
        InputError: a row has no words or no list of spans, or a span lies outside of the text, on no word or on another
            span; the row is named.
    """
    return [
        _row_of_spans(source, name, row, text, _spans(source, name, row, text, given))
        for row, (text, given) in enumerate(zip(texts, spans, strict=True), start=1)
    ]


def _row_of_spans(source: str, name: str, row: int, text: str, spans: list[tuple[int, int, str]]) -> Tagged:
    places = words_of(text, [border for start, end, _ in spans for border in (start, end)])
    if not places:
        raise _wrong(source, row, f"has no word in its text {_shown(text)}")
    tags = [OUTSIDE] * len(places)
    for start, end, label in spans:
        inside = [number for number, place in enumerate(places) if start <= place[0] < end]
        if not inside or any(tags[number] != OUTSIDE for number in inside):
            what = "lies on another one" if inside else "holds no word"
            raise _wrong(source, row, f"has a span in the column {name} that {what}: {start} to {end}, {label!r}")
        for number in inside:
            tags[number] = f"{'B' if number == inside[0] else 'I'}-{label}"
    return text, places, tuple(tags)


def _spans(source: str, name: str, row: int, text: str, given: Any) -> list[tuple[int, int, str]]:
    if not isinstance(given, list):
        raise _wrong(
            source, row, f"has no list of spans in the column {name}: {_shown(given)}; [] says that it has none"
        )
    found = []
    for span in given:
        if not isinstance(span, dict) or not all(key in span for key in SPAN_KEYS):
            raise _wrong(source, row, f"has a span without {', '.join(SPAN_KEYS)} in the column {name}: {_shown(span)}")
        start, end = span["start"], span["end"]
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
            raise _wrong(source, row, f"has a span outside of its {len(text)} characters: {_shown(span)}")
        found.append((start, end, _name(source, row, span["label"])))
    return sorted(found)


def _name(source: str, row: int, value: Any) -> str:
    try:
        name = text_of(value)
    except InputError as error:
        raise _wrong(source, row, f"has a tag that is {error}") from error
    if not name:
        raise _wrong(source, row, f"has a tag without a name; {OUTSIDE!r} says that a word belongs to nothing")
    return name


def _wrong(source: str, row: int, what: str) -> InputError:
    return InputError(f"{row_of(source, row)} {what}")


def _shown(value: Any) -> str:
    return shortened(repr(value), 80)
