"""Reading labelled text: four formats agree, and every fault is one line."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qrlora_deploy.data.examples import TextRows, examples_of, read_examples, read_texts
from qrlora_deploy.data.readers import Table
from qrlora_deploy.errors import InputError


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
        (b"text\tlabel\na\tb\nc\n", "row 2 has 1 column instead of 2"),
        (b"text\tlabel\na\t\n", "row 1 has no label"),
        (b"text\tlabel\n\xff\tb\n", "row 1 is not UTF-8"),
        (b"text\tlabel\tcaf\xe9\na\tb\tc\n", "a column name is not UTF-8; save the file as UTF-8"),
        (b"text\tlabel \tlabel\na\tb\tc\n", "the column label occurs twice"),
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


COLUMNS = {"nan": float("nan"), "null": None, "empty": " "}


def write_jsonl(path: Path, labels: list[object]) -> Path:
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    return path


@pytest.mark.parametrize("missing", COLUMNS.values(), ids=COLUMNS)
def test_what_is_missing_is_no_label(tmp_path: Path, missing: object) -> None:
    with pytest.raises(InputError, match="row 3 has no label; every example needs one"):
        read_examples(write_jsonl(tmp_path / "a.jsonl", [1.5, 2.5, missing]))
    if not isinstance(missing, str):
        table = pyarrow.table({"text": ["a"] * 3, "label": pyarrow.array([1.5, 2.5, missing], pyarrow.float64())})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(InputError, match="row 3 has no label"):
            read_examples(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (["billing", ["refund"]], "the label is a list, ['refund']; a label is a name, a number or a list of names"),
        (["billing", "billing"], "the label is a list that names a label twice: ['billing', 'billing']"),
        (["billing", None], "the label is a list with an empty name: ['billing', None]"),
        ({"a": 1}, "the label is an object, {'a': 1}"),
        (float("inf"), "the label is inf, which is no finite number"),
        ("half \ud83d", "the label is not valid Unicode: 'half \\\\ud83d'"),
    ],
)
def test_a_label_that_is_no_single_value_is_refused_with_row_and_value(
    tmp_path: Path, label: object, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape("a.jsonl line 2: ") + ".*") as caught:
        read_examples(write_jsonl(tmp_path / "a.jsonl", ["one", label]))
    assert message.replace("\\\\", "\\") in str(caught.value)


def test_one_hot_columns_of_parquet_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"], "label": [[1, 0], [0, 1]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match=r"row 1: the label is a list, \[1, 0\], as all lists are of 0 and 1; give the"
    ):
        read_examples(tmp_path / "a.parquet")


def test_lists_are_several_labels(tmp_path: Path) -> None:
    assert read_examples(write_jsonl(tmp_path / "a.jsonl", [["b", " a "], [], ["c"], "d", [2, True]])).labels == [
        ("b", "a"),
        (),
        ("c",),
        "d",
        ("2", "true"),
    ]
    table = pyarrow.table({"text": ["a", "b"], "label": [["x", "y"], []]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet").labels == [("x", "y"), ()]


def test_labels_are_the_same_from_every_format(tmp_path: Path) -> None:
    # Whole numbers of which a program wrote some with a point, and truth values.
    assert read_examples(write_jsonl(tmp_path / "a.jsonl", [1.0, 2, 1])).labels == ["1", "2", "1"]
    assert read_examples(write_jsonl(tmp_path / "a.jsonl", [1.0, 2.5, 1])).labels == ["1.0", "2.5", "1"]
    assert read_examples(write_jsonl(tmp_path / "a.jsonl", [1.0, 2.0])).labels == ["1.0", "2.0"]
    assert read_examples(write_jsonl(tmp_path / "a.jsonl", [True, False])).labels == ["true", "false"]
    assert read_examples(write_jsonl(tmp_path / "a.jsonl", [" padded ", "x"])).labels == ["padded", "x"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [True]}), tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet").labels == ["true"]


def test_blanks_around_names_of_columns_do_not_count(tmp_path: Path) -> None:
    for name, content in (("a.csv", "text, label\na,b\n"), ("a.jsonl", '{"text ": "a", " label": "b"}\n')):
        (tmp_path / name).write_text(content)
        for options in ((), (" text", "label ")):
            found = read_examples(tmp_path / name, *options)
            assert (found.texts, found.labels) == (["a"], ["b"])


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_row_of_megabytes_is_read(tmp_path: Path, name: str) -> None:
    long, mark = "word " * 600_000, "," if name == "a.csv" else "\t"
    rows = (("text", "label"), ("short", "x"), (long, "y"), ("last", "z"))
    (tmp_path / name).write_text("".join(f"{mark.join(row)}\n" for row in rows))
    found = read_examples(tmp_path / name)
    assert found.labels == ["x", "y", "z"] and found.texts[1] == long


def test_rows_and_lines_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qrlora_deploy.data.readers.MAX_ROW_BYTES", 2**20)
    monkeypatch.setattr("qrlora_deploy.data.json_lines.MAX_LINE_BYTES", 2**20)
    (tmp_path / "a.tsv").write_text("text\tlabel\na\tb\n" + "word " * 600_000 + "\tc\n")
    with pytest.raises(InputError, match=r"a.tsv: line 3: a row is longer than 1 MB; shorten it"):
        read_examples(tmp_path / "a.tsv")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "b"}\n' + '{"text": "' + "word " * 300_000)
    with pytest.raises(InputError, match=r"a.jsonl: line 2 is longer than 1 MB"):
        read_examples(tmp_path / "a.jsonl")


def test_a_file_without_an_end_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyarrow.csv.open_csv", lambda *_: pytest.fail("the whole file is parsed"))
    for name in ("a.tsv", "a.csv", "a.jsonl"):
        with (tmp_path / name).open("wb") as file:
            file.write(b"text\tlabel\n" if name == "a.tsv" else b"text,label\n" if name == "a.csv" else b"")
            file.truncate(10**11)  # sparse: it takes no room on the disk
        with pytest.raises(InputError, match=r"line \d.* is longer than 64 MB"):
            read_examples(tmp_path / name)
        (tmp_path / name).unlink()


def test_a_row_of_parquet_that_is_no_text_is_named(tmp_path: Path) -> None:
    stored = pyarrow.array([b"fine", b"caf\xe9"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, stored.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "label": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a.parquet: row 2 is not UTF-8"):
        read_examples(tmp_path / "a.parquet")


def test_more_columns_than_a_table_has_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(f"c{number}" for number in range(200_000)) + "\n")
    with pytest.raises(InputError, match=r"has 200000 columns; 10000 are the most. Is the header missing\?"):
        read_examples(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": "b", "n": ' + "9" * 5000 + "}", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"text": "half \\ud800", "label": "b"}', "row 2: the text is not valid Unicode"),
        ('{"text": 5, "label": "b"}', "row 2 has no text in the column text"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"text": "a", "label": "b", "label": "c"}', "line 2 has the name 'label' twice"),
    ],
)
def test_foreign_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "label": "b"}}\n{line}\n')
    with pytest.raises(InputError, match=message) as caught:
        read_examples(tmp_path / "a.jsonl")
    assert len(str(caught.value)) < 500


def test_a_name_of_a_parquet_column_that_is_no_text(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a"], "label": ["b"], "naive": ["c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", store_schema=False)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"naive", b"na\xefve"))
    with pytest.raises(InputError, match="a column name is not UTF-8"):
        read_examples(tmp_path / "a.parquet")


def test_columns_that_a_library_changes_are_refused_where_they_are_used() -> None:
    table = Table({"text": ["a"], "label": ["7"], "more": ["x"]}, converted=frozenset({"label"}))
    with pytest.raises(InputError, match="the column label holds values of several kinds"):
        examples_of("owner/set", table, None, None)
    assert examples_of("owner/set", table, None, "more").labels == ["x"]


class Hub:
    """Stands for a data set as `datasets` gives it."""

    def __init__(self, features: dict[str, object], **columns: list[object]) -> None:
        self.features, self.columns, self.column_names = features, columns, list(columns)

    def __getitem__(self, name: str) -> list[object]:
        return self.columns[name]


def test_a_data_set_of_the_hub_is_read_as_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Json:
        pass

    text, truth, when = (datasets.Value(kind) for kind in ("string", "bool", "timestamp[s]"))
    names = datasets.ClassLabel(names=["no", "yes"])
    features = {"text": text, "label": truth, "named": names, "mixed": Json(), "day": when}
    hub = Hub(features, text=["a"], label=[True], named=[1], mixed=["7"], day=["2024-01-01"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    assert read_examples("owner/set").labels == ["true"]
    assert read_examples("owner/set", None, "named").labels == ["yes"]
    for column in ("mixed", "day"):
        with pytest.raises(InputError, match=f"owner/set: the column {column} holds values of several kinds or dates"):
            read_examples("owner/set", None, column)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '"te""xt","la\nbel"\na,b\n'),
        ("a.csv", '\n\n"te""xt","la\nbel"\r\na,b\r\n'),
        ("a.tsv", 'te"xt\tla,bel\na\tb\n'),
        ("a.tsv", '\ufeffte"xt\tla,bel\ra\tb\r'),
    ],
)
def test_headers_of_every_kind_are_read_as_the_rows_are(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    columns = ('te"xt', "la\nbel" if name == "a.csv" else "la,bel")
    found = read_examples(tmp_path / name, *columns)
    assert (found.texts, found.labels) == (["a"], ["b"])
