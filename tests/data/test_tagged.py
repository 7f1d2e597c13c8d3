"""Rows whose words have tags: which columns they are, and what is refused with its line."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Sequence as ListOf

from qrlora_deploy.data.examples import _named, read_examples, read_texts
from qrlora_deploy.errors import InputError


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize(("words", "tags"), [("tokens", "tags"), ("tokens", "ner_tags"), ("words", "labels")])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_of_words_and_tags(words: str, tags: str, suffix: str, tmp_path: Path) -> None:
    rows = [{words: ["Ada", "in", " Köln "], tags: ["B-PER", "O", "B-LOC"]}, {words: ["Hi"], tags: ["O"]}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write(path, *rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_examples(path)
    assert found.texts == ["Ada in Köln", "Hi"] and found.pairs is None
    assert found.labels == [("B-PER", "O", "B-LOC"), ("O",)]
    assert found.words == [((0, 3), (4, 6), (7, 11)), ((0, 2),)]
    assert read_texts(path).texts == found.texts
    assert found.take([1]).words == [((0, 2),)] and found.take([1]).digest != found.digest


def test_columns_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"a": ["x", "y"], "b": ["O", "B-X"], "text": "x y", "label": "no"})
    assert read_examples(path, "a", "b").labels == [("O", "B-X")]
    assert read_examples(path).labels == ["no"]


def test_spans_are_tags_of_the_words_that_they_hold(tmp_path: Path) -> None:
    spans = [{"start": 12, "end": 20, "label": "LOC"}, {"start": 0, "end": 2, "label": "PER"}]
    path = write(
        tmp_path / "a.jsonl",
        {"text": "Ada lives in New York.", "spans": []},
        {"text": "Ada's at New York", "spans": spans},
    )
    with pytest.raises(InputError, match=r"a.jsonl line 2 has a span outside of its 17 characters"):
        read_examples(path)
    spans[0] = {"start": 9, "end": 17, "label": "LOC"}
    write(path, {"text": "Ada lives in New York.", "spans": []}, {"text": "Ada's at New York", "spans": spans})
    found = read_examples(path)
    assert found.labels[0] == ("O",) * 6 and found.words is not None
    words = [found.texts[1][start:end] for start, end in found.words[1]]
    # A span that ends within a word parts it.
    assert list(zip(words, found.labels[1], strict=True)) == [
        ("Ad", "B-PER"),
        ("a", "O"),
        ("'", "O"),
        ("s", "O"),
        ("at", "O"),
        ("New", "B-LOC"),
        ("York", "I-LOC"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "has 2 tokens but 1 tags; every word needs one tag"),
        ({"tokens": ["a"], "tags": None}, "has 1 tokens but no tags"),
        ({"tokens": [], "tags": []}, "has no list of words in the column tokens"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "that is empty or no text"),
        ({"tokens": ["a"], "tags": [None]}, "has a tag without a name"),
        ({"tokens": ["a"], "tags": [["O"]]}, "has a tag that is a list"),
    ],
)
def test_rows_that_do_not_fit_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"tokens": ["a"], "tags": ["O"]}, row)
    with pytest.raises(InputError, match=r"a.jsonl line 2 ") as caught:
        read_examples(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([{"start": 0, "end": 1, "label": "A"}, {"start": 0, "end": 3, "label": "B"}], "lies on another one: 0 to 3"),
        ([{"start": 2, "end": 3, "label": "A"}], "holds no word"),
        ([{"start": 0, "label": "A"}], "has a span without start, end, label"),
        ([{"start": 0, "end": True, "label": "A"}], "outside of its 4 characters"),
        ([{"start": 0, "end": 1, "label": ""}], "has a tag without a name"),
        (None, "has no list of spans"),
    ],
)
def test_spans_that_do_not_fit_are_named(spans: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a", "spans": []}, {"text": "ab c", "spans": spans})
    with pytest.raises(InputError, match=r"a.jsonl line 2 ") as caught:
        read_examples(path)
    assert message in str(caught.value)


def test_tags_of_a_data_set_in_parquet_have_their_names(tmp_path: Path) -> None:
    features = Features({"tokens": ListOf(Value("string")), "ner_tags": ListOf(ClassLabel(names=["O", "B-X"]))})
    data = Dataset.from_list([{"tokens": ["a", "b"], "ner_tags": [1, 0]}], features)
    data.to_parquet(tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet").labels == [("B-X", "O")]


@pytest.mark.parametrize(
    "note", [b"", b"{", b"[]", b'{"info": {"features": []}}', b'{"info": {"features": {"ner_tags": 1}}}']
)
def test_notes_that_say_nothing_are_passed_over(note: bytes, tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"tokens": ["a"], "ner_tags": [7]}])
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": note}), tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet").labels == [("7",)]


def test_tags_of_a_data_set_by_their_names() -> None:
    features = Features({"tags": ListOf(ClassLabel(names=["O", "B-X"])), "plain": ListOf(Value("string"))})
    assert _named(features["tags"], [[0, 1], [1]]) == [["O", "B-X"], ["B-X"]]
    assert _named(features["plain"], [["a"]]) == [["a"]]
