"""`train` on the command line: what it warns of. Whole runs are in test_end_to_end.py."""

import shutil
from pathlib import Path

import pytest

from tests.cli.running import run_here, succeed_here
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
    ran = run_here(*COMMAND, *SETTINGS, "--epochs", 3, "--patience", 1, "--metric", "matthews", cwd=place)
    assert ran.code == 0, ran.err
    assert "Note: ended after 2 of 3 epochs, no gain on --eval; the best one is kept\n" in ran.err
    assert "Warning: matthews is 0 on the held-out rows" in ran.err and "--learning-rate 0.015\n" in ran.err
    assert (place / "out").is_file()


def test_no_held_out_rows_are_no_warning(place: Path) -> None:
    command = [argument for argument in COMMAND if argument not in ("--eval", "dev.tsv")]
    ran = run_here(*command, *SETTINGS, cwd=place)
    assert ran.code == 0 and "Warning" not in ran.err


def stop_before_writing(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Interrupt a run when everything is trained and nothing written; its folder."""

    def interrupt(customer: object, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("qrlora_deploy.formats.coefficients.write_coefficients", interrupt)
        assert run_here(*RESUMED, *SETTINGS, cwd=place).code == 130
    return place / ".out.work"


RESUMED = [argument for argument in COMMAND if argument not in ("--eval", "dev.tsv")]


def test_an_interrupted_run_is_not_deleted_and_a_damaged_one_starts_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stop_before_writing(place, monkeypatch)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = run_here(*RESUMED, *SETTINGS, cwd=place)
    assert again.code == 2 and "continue it by --resume, or remove .out.work to start again" in again.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    whole = succeed_here([*RESUMED[:-1], "whole", *SETTINGS], place)
    newest = next(folder.glob("checkpoint-*"))
    (newest / "optimizer.pt").write_bytes(b"")
    ran = run_here(*RESUMED, *SETTINGS, "--resume", "--json", cwd=place)
    assert ran.code == 0 and ran.json["digest"] == whole["digest"]
    assert ran.err == (
        f"Warning: .out.work/{newest.name} is passed over: optimizer.pt was changed after it was written; "
        "it starts from the beginning\n"
    )
    assert not folder.exists()
