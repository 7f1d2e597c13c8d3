"""`train` on the command line: what it warns of. Whole runs are in test_end_to_end.py."""

import shutil
from pathlib import Path

import pytest

from tests.cli.running import run_here
from tests.training.fleet.making import random_rows, write_rows

COMMAND = ["train", "base", "--basis", "basis.safetensors", "--data", "train.tsv", "--eval", "dev.tsv", "-o", "out"]
SETTINGS = ["--epochs", 1, "--max-length", 16, "--device", "cpu", "--learning-rate", 0.03]


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, tiny_basis_file: Path) -> Path:
    """A folder with a base, its basis and training rows."""
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copy(tiny_basis_file, tmp_path / "basis.safetensors")
    write_rows(tmp_path / "train.tsv", random_rows(6, 0))
    return tmp_path


def test_answers_without_relation_to_the_labels_are_a_warning(place: Path) -> None:
    write_rows(place / "dev.tsv", random_rows(6, 1, ["travel"]))
    ran = run_here(*COMMAND, *SETTINGS, cwd=place)
    assert ran.code == 0, ran.err
    assert "Warning: matthews is 0 on the held-out rows" in ran.err and "--learning-rate 0.015\n" in ran.err
    assert (place / "out").is_file()


def test_no_held_out_rows_are_no_warning(place: Path) -> None:
    command = [argument for argument in COMMAND if argument not in ("--eval", "dev.tsv")]
    ran = run_here(*command, *SETTINGS, cwd=place)
    assert ran.code == 0 and "Warning" not in ran.err
