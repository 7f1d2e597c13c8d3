"""`combine` on the command line: parts and weights, the basis found again, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.cli.combine import parse_part
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.models.locating import locate_basis
from tests.cli.running import run, run_here, succeed
from tests.tolerances import EXACT


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_customer: Coefficients, tiny_basis_file: Path) -> Path:
    """The current folder: a basis and two customers in `parts`, and an empty folder `made`."""
    parts = tmp_path / "parts"
    parts.mkdir()
    (tmp_path / "made").mkdir()
    shutil.copy(tiny_basis_file, parts / "basis.safetensors")
    one = replace(tiny_customer, basis_file="basis.safetensors")
    write_coefficients(one, parts / "a.safetensors")
    write_coefficients(replace(one, values=one.values[::-1].copy()), parts / "b.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_combine(place: Path, tiny_customer: Coefficients) -> None:
    made = succeed(
        ["combine", "parts/a.safetensors:0.75", "parts/b.safetensors:-.25", "-o", "made/c.safetensors"], place
    )
    file = place / "made" / "c.safetensors"
    combined = read_coefficients(file)
    values = tiny_customer.values.astype(np.float64)
    np.testing.assert_allclose(combined.values, (0.75 * values - 0.25 * values[::-1]).astype(np.float32), **EXACT)
    assert made["digest"] == combined.digest and made["size_bytes"] == file.stat().st_size
    assert [(part["file"], part["weight"]) for part in made["parts"]] == [
        ("parts/a.safetensors", 0.75),
        ("parts/b.safetensors", -0.25),
    ]
    assert combined.training == {
        "combined": [{"digest": part["digest"], "weight": part["weight"]} for part in made["parts"]]
    }
    assert combined.basis_file == "../parts/basis.safetensors"
    assert locate_basis(combined, file).digest == combined.basis_digest


def test_one_part_without_a_weight(place: Path, tiny_customer: Coefficients) -> None:
    ran = run("combine", "parts/a.safetensors", "-o", "c.safetensors", cwd=place)
    assert ran.code == 0 and "wrote c.safetensors" in ran.out
    assert read_coefficients(place / "c.safetensors").digest == tiny_customer.digest


def test_a_colon_in_the_name_of_a_file(place: Path) -> None:
    (place / "a:2").write_bytes(b"")
    assert parse_part("a:2") == (Path("a:2"), 1.0)
    assert parse_part("a:2:-1e-3") == (Path("a:2"), -1e-3)
    with pytest.raises(InputError, match="no such file"):
        parse_part("")


REFUSED = {
    "no file": ("nothing.safetensors:0.5", "nothing.safetensors: no such file"),
    "no weight": ("parts/a.safetensors:", "''"),
    "a word": ("parts/a.safetensors:half", "'half' is not a finite number"),
    "nan": ("parts/a.safetensors:nan", "'nan'"),
    "inf": ("parts/a.safetensors:-inf", "'-inf'"),
    "too large": ("parts/a.safetensors:1e400", "'1e400'"),
    "larger than fp32": ("parts/a.safetensors:1e39", "parts/a.safetensors: the weight 1e+39"),
    "not a customer": ("parts/basis.safetensors", "not a qrlora-coefficients file"),
    "overflow": ("parts/a.safetensors:3.4e38", "parts/a.safetensors, parts/b.safetensors does not fit fp32"),
    "itself": ("made/c.safetensors", "one of the parts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(place: Path, case: str) -> None:
    part, line = REFUSED[case]
    old = shutil.copy(place / "parts" / "a.safetensors", place / "made" / "c.safetensors").read_bytes()
    shown = run_here("combine", part, "parts/b.safetensors:2", "-o", "made/c.safetensors", cwd=place)
    assert shown.code == 2
    assert shown.err.startswith("Error: ") and len(shown.err.splitlines()) == 1 and line in shown.err, shown.err
    assert (place / "made" / "c.safetensors").read_bytes() == old


def test_both_files_are_named(place: Path, tiny_customer: Coefficients) -> None:
    write_coefficients(replace(tiny_customer, basis_digest="e" * 64), place / "foreign.safetensors")
    ran = run_here("combine", "parts/a.safetensors", "foreign.safetensors", "-o", "c.safetensors", cwd=place)
    shown = ran.err
    assert ran.code == 2
    assert "parts/a.safetensors was trained on basis" in shown and "foreign.safetensors on eeeeeeeeeeee" in shown
    assert not (place / "c.safetensors").exists()
