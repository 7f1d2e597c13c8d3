"""Reading labelled text: four formats agree, and every fault is one line."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qrlora_deploy.errors import InputError
from qrlora_deploy.training.data import TextRows, read_examples, read_texts


def test_four_formats_give_the_same_examples(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nNA\t007\né, b\ttrue\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text('sentence,label\nNA,007\n"é, b",true\n', encoding="utf-8")
    lines = '{"sentence": "NA", "label": "007"}\n{"sentence": "é, b", "label": "true"}\n'
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    table = pyarrow.table({"sentence": ["NA", "é, b"], "label": ["007", "true"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = [read_examples(tmp_path / f"a.{kind}") for kind in ("tsv", "csv", "jsonl", "parquet")]
    assert len({examples.digest for examples in found}) == 1
    assert all(e.texts == ["NA", "é, b"] and e.labels == ["007", "true"] and e.pairs is None for e in found)


def test_texts_need_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("question\tsentence\na\tb\nc\td\n")
    assert read_texts(tmp_path / "a.tsv") == TextRows(["a", "c"], ["b", "d"], str(tmp_path / "a.tsv"))
    assert read_texts(tmp_path / "a.tsv", "sentence").texts == ["b", "d"]
    (tmp_path / "a.csv").write_text("text,label\na,\n")
    assert read_texts(tmp_path / "a.csv") == TextRows(["a"], None, str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(InputError, match="holds no rows"):
        read_texts(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"text\tlabel\n", "holds no rows"),
        (b"text\tother\na\tb\n", "which column is the label"),
        (b"other\tlabel\na\tb\n", "It has other, label"),
        (b"text\tlabel\na\tb\nc\n", "cannot be read as TSV"),
        (b"text\tlabel\na\t\n", "row 1 has no label"),
        (b"text\tlabel\n\xff\tb\n", "UTF"),
        (b"text\ttext\na\tb\n", "occurs twice"),
    ],
)
def test_faults_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.tsv").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_examples(tmp_path / "bad.tsv")
    assert "\n" not in str(caught.value) and "bad.tsv" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_examples(tmp_path / "none.tsv")
