"""Which customers a fleet trains: rows by customer, what is refused and why, and shards."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.multi_label import MultiLabel
from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.training.fleet.customers import FleetSource, Shard, choose_customers
from qrlora_deploy.training.fleet.grouping import read_groups
from tests.training.fleet.making import random_rows, settings_of, write_rows

GOOD = b"id\ttext\tlabel\na\tbook a flight\ttravel\nb\trice\tkitchen\na\tplay music\thome\n"


@pytest.fixture(scope="module")
def checkpoint(tiny_base: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_base))


def every(_: str) -> bool:
    return True


def test_rows_keep_their_order_and_their_digest(tmp_path: Path) -> None:
    (tmp_path / "all.tsv").write_bytes(GOOD)
    write_rows(tmp_path / "a.tsv", [("book a flight", "travel"), ("play music", "home")])
    groups = read_groups(tmp_path / "all.tsv", "id", None, None, every)
    assert groups.examples["a"].texts == ["book a flight", "play music"] and groups.refused == {}
    assert groups.examples["a"].digest == read_examples(tmp_path / "a.tsv").digest
    assert read_groups(tmp_path / "all.tsv", "id", None, None, lambda name: name == "b").examples.keys() == {"b"}


def test_every_kind_of_file_gives_the_same(tmp_path: Path) -> None:
    (tmp_path / "all.tsv").write_bytes(GOOD)
    (tmp_path / "all.csv").write_bytes(GOOD.replace(b"\t", b","))
    rows = [line.split("\t") for line in GOOD.decode().splitlines()[1:]]
    lines = [f'{{"id": "{name}", "text": "{text}", "label": "{label}"}}' for name, text, label in rows]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(("id", "text", "label"))}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "all.parquet")
    found = [
        {name: examples.digest for name, examples in read_groups(path, "id", None, None, every).examples.items()}
        for path in sorted(tmp_path.iterdir())
    ]
    assert len(found) == 4 and len(found[0]) == 2 and found.count(found[0]) == 4


def test_a_folder_may_hold_parts_of_one_table(tmp_path: Path) -> None:
    for number, part in enumerate((GOOD, GOOD + b"c\trice\tkitchen\n")):
        (tmp_path / f"part-{number}.tsv").write_bytes(part)
    groups = read_groups(tmp_path, "id", None, None, every)
    assert {name: len(examples) for name, examples in groups.examples.items()} == {"a": 4, "b": 2, "c": 1}
    (tmp_path / "part-2.tsv").write_text("who\ttext\tlabel\nx\ty\tz\n")
    with pytest.raises(InputError, match="no column id"):
        read_groups(tmp_path, "id", None, None, every)


@pytest.mark.parametrize(
    ("name", "broken", "whose", "reason"),
    [
        ("all.tsv", b"b\tcaf\xe9\tkitchen\n", "b", "row 4 is not UTF-8"),
        ("all.tsv", b"b\trice\tkitchen\tand more\n", "b", "has 4 columns instead of 3"),
        ("all.tsv", b"b\trice\n", "b", "has 2 columns instead of 3"),
        ("all.tsv", b"\xff\trice\tkitchen\n", "\\xff", "row 4 is not UTF-8"),
        ("all.tsv", b"b\tcaf\xe9\tkitchen\tand more\n", "b", "row 4 has 4 columns instead of 3"),
        ("all.tsv", b"b\trice\t\n", "b", "row 2 has no label"),
        ("all.jsonl", b'{"id": "b", "text": 5, "label": "kitchen"}\n', "b", "row 2 has no text"),
        ("all.jsonl", b'{"id": "b", "text": "caf\xe9"}\n', "", "line 4 is not UTF-8"),
        ("all.jsonl", b"[1]\n", "", "line 4 is not a JSON object"),
        ("all.jsonl", b'{"id": "b", "n": ' + b"9" * 5000 + b"}\n", "", "line 4 is not JSON"),
        ("all.jsonl", b'{"id": "b", "text": "\\ud800", "label": "kitchen"}\n', "b", "row 2: the text is not valid"),
        ("all.jsonl", b'{"id": "b", "text": "rice", "label": NaN}\n', "b", "row 2 has no label"),
        ("all.jsonl", b'{"id": "b", "text": "rice", "label": [["kitchen"]]}\n', "b", "row 2: the label is a list"),
        ("all.tsv", b"B\trice\tkitchen\n", "B", "'B' and 'b' differ in case alone"),
    ],
)
def test_a_broken_row_costs_one_customer(tmp_path: Path, name: str, broken: bytes, whose: str, reason: str) -> None:
    rows = [line.split("\t") for line in GOOD.decode().splitlines()[1:]]
    lines = [f'{{"id": "{name}", "text": "{text}", "label": "{label}"}}\n' for name, text, label in rows]
    (tmp_path / name).write_bytes((GOOD if name.endswith("tsv") else "".join(lines).encode()) + broken)
    groups = read_groups(tmp_path / name, "id", None, None, every)
    concerned = {"b", "B"} if whose == "B" else {whose}
    assert groups.refused.keys() == concerned and reason in groups.refused[whose]
    assert groups.examples.keys() == {"a", "b"} - concerned


def test_shards_part_the_customers_and_stay_as_they_are(tmp_path: Path, checkpoint: Checkpoint) -> None:
    names = [f"customer-{number}" for number in range(50)] + ["no id"]
    write_rows(
        tmp_path / "all.tsv", [(name, *row) for name in names for row in random_rows(2, 0)], ("id", "text", "label")
    )
    source = FleetSource(tmp_path / "all.tsv", customer_column="id")
    parts_found = [choose_customers(source, checkpoint, settings_of(), Shard(index, 4)) for index in range(4)]
    parts = [[customer.name for customer in found.customers] for found in parts_found]
    assert sorted(name for part in parts for name in part) == sorted(names[:-1])
    assert all(3 < len(part) < 25 for part in parts)
    assert [name for found in parts_found for name in found.refused] == ["no id"]
    # A hash of the name alone: pinned, so that a run may be resumed by another version and on another machine.
    assert [Shard(index, 4).holds("acme") for index in range(4)] == [True, False, False, False]
    for index, count in ((4, 4), (-1, 4), (0, 0)):
        with pytest.raises(InputError, match="I from 0 to N - 1"):
            Shard(index, count)


@pytest.mark.parametrize("name", ["../out", ".hidden", "a/b", "a b", "a" * 129, "ä"])
def test_what_is_no_customer_id_is_refused(tmp_path: Path, checkpoint: Checkpoint, name: str) -> None:
    write_rows(tmp_path / "all.tsv", [(name, "rice", "kitchen"), ("good", "rice", "kitchen")], ("id", "text", "label"))
    found = choose_customers(
        FleetSource(tmp_path / "all.tsv", customer_column="id"), checkpoint, settings_of(), Shard()
    )
    assert [customer.name for customer in found.customers] == ["good"] and found.refused.keys() == {name}
    assert "no customer id" in found.refused[name]


def test_held_out_rows_belong_to_their_customer(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "all.tsv").write_bytes(GOOD)
    rows = [("a", "rice", "kitchen"), ("b", "rice", "unheard of"), ("stranger", "rice", "kitchen")]
    write_rows(tmp_path / "dev.tsv", rows, ("id", "text", "label"))
    source = FleetSource(tmp_path / "all.tsv", tmp_path / "dev.tsv", "id")
    found = choose_customers(source, checkpoint, settings_of(), Shard())
    assert [(customer.name, len(customer.evaluation_targets)) for customer in found.customers] == [("a", 1)]
    assert "unheard of" in found.refused["b"] and found.strangers == 1


def test_files_whose_names_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    for name in ("Good", "good", "other"):
        write_rows(tmp_path / f"{name}.tsv", [("rice", "kitchen")])
    groups = read_groups(tmp_path, None, None, None, every)
    assert groups.examples.keys() == {"other"} and groups.refused.keys() == {"Good", "good"}


def test_a_column_name_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "all.tsv").write_bytes(GOOD.replace(b"label", b"label\tcaf\xe9", 1))
    with pytest.raises(InputError, match="a column name is not UTF-8"):
        read_groups(tmp_path / "all.tsv", "id", None, None, every)


def numbers_of(*customers: tuple[str, list[object]]) -> str:
    rows = [{"id": name, "text": "a", "label": label} for name, labels in customers for label in labels]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_a_fleet_of_numbers_is_no_mixture(tmp_path: Path, checkpoint: Checkpoint) -> None:
    content = numbers_of(("a", [1.5, 2.5, 3]), ("b", [1.5, float("nan"), 2.5]), ("c", [1, 2, 3]), ("d", ["x", "y"]))
    (tmp_path / "all.jsonl").write_text(content)
    source = FleetSource(tmp_path / "all.jsonl", customer_column="id")
    found = choose_customers(source, checkpoint, settings_of(head="output"), Shard())
    assert {item.name: item.outputs.task for item in found.customers} == {
        "a": Regression(),
        "d": Classification(),
    }
    assert "row 2 has no label" in found.refused["b"]
    assert found.refused["c"] == "its labels are whole numbers, those of a fractions; say what they are by task"
    said = choose_customers(source, checkpoint, settings_of(head="output", task="regression"), Shard())
    assert {item.name: item.outputs.task for item in said.customers} == dict.fromkeys("ac", Regression())
    assert "a regression needs numbers as labels, not 'x', 'y'" in said.refused["d"]


def test_customers_of_several_labels_a_row_train_beside_the_others(tmp_path: Path, checkpoint: Checkpoint) -> None:
    rows = [("a", "x"), ("a", "y"), ("b", ["1", "2"]), ("b", []), ("c", 0.5), ("c", 1)]
    lines = [json.dumps({"id": name, "text": "rice", "label": label}) for name, label in rows]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    source = FleetSource(tmp_path / "all.jsonl", customer_column="id")
    found = choose_customers(source, checkpoint, settings_of(head="output"), Shard())
    # Names in lists are no numbers that were meant, whatever others have.
    tasks = {item.name: item.outputs.task for item in found.customers}
    assert tasks == {"a": Classification(), "b": MultiLabel(), "c": Regression()} and not found.refused
    assert found.customers[1].targets == [[1.0, 1.0], [0.0, 0.0]]
    judged = choose_customers(source, checkpoint, settings_of(head="output", metric="f1_micro"), Shard())
    assert [item.name for item in judged.customers] == ["b"]
    assert "metric must be one of accuracy, f1, matthews for text-classification" in judged.refused["a"]


def test_a_column_that_was_written_in_two_ways_is_one_for_all_customers(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "all.jsonl").write_text(numbers_of(("a", [1.0, 2.0]), ("b", [1, 2])))
    source = FleetSource(tmp_path / "all.jsonl", customer_column="id")
    found = choose_customers(source, checkpoint, settings_of(head="output"), Shard())
    assert {item.name: item.outputs.labels for item in found.customers} == {"a": ("1", "2"), "b": ("1", "2")}


def test_ids_are_text_as_labels_are(tmp_path: Path) -> None:
    ids = [1.0, 1, float("nan"), True, ["x"]]
    rows = [{"id": name, "text": "rice", "label": "kitchen"} for name in ids]
    (tmp_path / "all.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    groups = read_groups(tmp_path / "all.jsonl", "id", None, None, every)
    assert {name: len(part) for name, part in groups.examples.items()} == {"1": 2, "": 1, "true": 1, "['x']": 1}


def test_a_file_of_faults_alone_says_which(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(InputError, match="line 1 is not JSON"):
        read_groups(tmp_path / "all.jsonl", "id", None, None, every)
