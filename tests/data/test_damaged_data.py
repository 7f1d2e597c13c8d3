"""Damaged data files have two outcomes: an error in one line, or examples that every step after can use."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.names import label_names
from qrlora_deploy.tasks.registry import guess_task
from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.training.fleet.grouping import read_groups

ROWS = [
    ("a", "book a flight", "travel", "1.5"),
    ("b", 'rice "and" beans, hot', "kitchen", "2"),
    ("a", "play müsic 🎵", "NA", "-3"),
    ("c", "what is 007", "007", "0.25"),
]
NAMES = ("id", "text", "label", "score")

PIECES = (
    *(b"\xff", b"\xed\xa0\xbd", b"\xef\xbb\xbf", b"\0", b'"', b"\\", b"\r", b"\n", b"\t", b",", b" ", b"\xe2\x80\xa8"),
    *(b"\\ud83d", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{", b"}", b"[" * 5000, b"9" * 5000, b"1_1", b"3,5"),
)
"""What damages are made of, beside bytes at random: what a reader may stumble over."""


def tab_separated(path: Path) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in (NAMES, *ROWS)), encoding="utf-8")


def comma_separated(path: Path) -> None:
    rows = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row] for row in ROWS]
    path.write_text("".join(",".join(row) + "\n" for row in (NAMES, *rows)), encoding="utf-8")


def json_lines(path: Path) -> None:
    rows = [dict(zip(NAMES, (*row[:3], float(row[3])), strict=True)) for row in ROWS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def parquet(path: Path) -> None:
    columns = dict(zip(NAMES, map(list, zip(*ROWS, strict=True)), strict=True))
    table = pyarrow.table(columns | {"score": [float(value) for value in columns["score"]]})
    # Neither packed nor in a dictionary, so that damage reaches the values; checksums are what few writers make.
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)


FILES = {"a.tsv": tab_separated, "a.csv": comma_separated, "a.jsonl": json_lines, "a.parquet": parquet}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """`content` after one to four damages at random places."""
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        length = draw.choice((0, 1, 1, 2, 8))
        piece = draw.choice((bytes([draw.randrange(256)]), draw.choice(PIECES), content[place : place + 20], b""))
        content = content[:place] + piece + content[place + length :]
    return content if draw.random() > 0.05 else content[: draw.randrange(len(content) + 1)]


def read_well(examples: Examples) -> None:
    """Everything that comes after the reading takes these examples, or refuses them in one line."""
    assert len(examples.texts) == len(examples.labels) > 0
    names = [name for label in examples.labels for name in ((label,) if isinstance(label, str) else label)]
    for text in (*examples.texts, *names):
        text.encode()  # half a surrogate pair would not go
    assert all(name and name == name.strip() for name in names)
    assert len(examples.digest) == 64
    guess = guess_task(examples)
    outputs = ("score",) if guess.task == Regression() else label_names(guess.task.named(examples))
    assert len(guess.task.encode(examples, outputs)) == len(examples)


def check(action: Callable[[], None], path: Path) -> None:
    try:
        action()
    except InputError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 500 and path.name in line, line


def check_damages(folder: Path, name: str, seeds: range) -> None:
    path = folder / name
    FILES[name](path)
    whole = path.read_bytes()

    def read_fleet() -> None:
        groups = read_groups(path, "id", None, None, lambda _: True)
        for reason in groups.refused.values():
            assert "\n" not in reason and len(reason) < 500
        for examples in groups.examples.values():
            assert len(examples.texts) == len(examples.labels) > 0

    for seed in seeds:
        path.write_bytes(damaged(whole, random.Random(seed)))
        for label in ("label", "score"):
            check(lambda label=label: read_well(read_examples(path, None, label)), path)  # type: ignore[misc]
        check(read_fleet, path)


@pytest.mark.parametrize("name", FILES)
def test_whole_files_give_the_rows(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name)
    found = read_examples(tmp_path / name)
    assert list(zip(found.texts, found.labels, strict=True)) == [row[1:3] for row in ROWS]
    numbers = read_examples(tmp_path / name, None, "score")
    assert guess_task(numbers).task.encode(numbers, ("score",)) == [1.5, 2.0, -3.0, 0.25]


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_in_one_line_or_read_well(tmp_path: Path, name: str) -> None:
    check_damages(tmp_path, name, range(400))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_damaged_files_are_refused_in_one_line_or_read_well(tmp_path: Path, name: str) -> None:
    check_damages(tmp_path, name, range(1000, 3000))
