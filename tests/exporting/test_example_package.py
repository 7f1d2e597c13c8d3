"""Another package's exporter: found, offered, run and checked by the command line as ours are."""

import csv
import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.options import make_options
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from tests.cli.running import Ran, environment
from tests.exporting.installed import EXAMPLE, install_example
from tests.tolerances import EXACT

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the example package as pip leaves it."""
    folder = tmp_path_factory.mktemp("packages")
    install_example(folder)
    return folder


def run(arguments: Sequence[object], packages: Path, cwd: Path) -> Ran:
    """The command line in a process of its own, where the example package is installed."""
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(packages), variables["PYTHONPATH"]])
    command = [sys.executable, "-m", "qrlora_deploy.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables, timeout=200, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_a_customer_as_a_table(
    packages: Path,
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_basis_file: Path,
    tiny_customer: Coefficients,
    tiny_customer_file: Path,
    tmp_path: Path,
) -> None:
    common = ["--basis", tiny_basis_file, "--coefficients", tiny_customer_file]
    export = ["export", tiny_base, *common, "--format", "csv", "-o", "acme.csv", "--json"]
    ran = run([*export, "--separator", "semicolon"], packages, tmp_path)
    assert ran.code == 0, ran.err
    assert ran.json["rows"] == tiny_basis.total_rank
    with (tmp_path / "acme.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter=";")
    assert header == ["target", "direction", "coefficient"]
    np.testing.assert_allclose(np.array([row[2] for row in rows], dtype=np.float32), tiny_customer.values, **EXACT)
    assert [row[0] for row in rows] == [name for name, rank in tiny_basis.ranks.items() for _ in range(rank)]

    verify = ["verify", "acme.csv", "--format", "csv", "--base", tiny_base, *common, "--json"]
    assert run(verify, packages, tmp_path).json == {"rows": tiny_basis.total_rank, "wrong": 0, "passed": True}
    text = (tmp_path / "acme.csv").read_text()
    (tmp_path / "acme.csv").write_text(text.replace(rows[0][2], "7"))
    failed = run(verify, packages, tmp_path)
    assert failed.code == 1 and failed.json["passed"] is False and "1 of" in failed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--padding-free"], "--padding-free is no option of --format csv; it belongs to --format onnx"),
        (
            ["--head-labels", "3"],
            "--head-labels is no option of --format csv; it belongs to --format onnx and",
        ),
        (["--separator", "dot"], "Invalid value for '--separator'"),
        (["--digits", "0"], "Invalid value for '--digits'"),
        (["--format", "peft"], "--digits is no option of --format peft; it belongs to --format csv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_do_not_belong_to_it(
    packages: Path, options: list[str], message: str, tiny_customer_file: Path, tmp_path: Path
) -> None:
    export = ["export", "--coefficients", tiny_customer_file, "--format", "csv", "-o", "acme.csv"]
    digits = [] if "--digits" in options else ["--digits", "5"]
    ran = run([*export, *digits, *options], packages, tmp_path)
    assert ran.code == 2 and message in ran.err and list(tmp_path.iterdir()) == []


def test_it_needs_its_customer_and_replaces_nothing_else(
    packages: Path, tiny_base: Path, tiny_basis_file: Path, tiny_customer_file: Path, tmp_path: Path
) -> None:
    export = ["export", tiny_base, "--basis", tiny_basis_file, "--format", "csv", "-o", "mine.txt"]
    ran = run(export, packages, tmp_path)
    assert ran.code == 2 and "--format csv writes one customer; give it by --coefficients" in ran.err
    (tmp_path / "mine.txt").write_text("a letter")
    ran = run([*export, "--coefficients", tiny_customer_file], packages, tmp_path)
    assert ran.code == 2 and "is no table of coefficients" in ran.err
    assert (tmp_path / "mine.txt").read_text() == "a letter"


def test_merge_is_not_for_it_and_a_mistake_of_it_is_told_as_its_own(
    packages: Path, tiny_base: Path, tiny_basis_file: Path, tiny_customer_file: Path, tmp_path: Path
) -> None:
    common = ["--basis", tiny_basis_file, "--coefficients", tiny_customer_file, "--format", "csv", "-o", "acme.csv"]
    ran = run(["export", tiny_base, *common, "--merge"], packages, tmp_path)
    assert ran.code == 2 and "--merge belongs to --format onnx; leave it out with --format csv" in ran.err
    module = packages / "qrlora_csv.py"
    module.write_text(module.read_text("utf-8").replace("job.basis.split(", "job.basis.cut("), "utf-8")
    ran = run(["export", tiny_base, *common], packages, tmp_path)
    assert ran.code == 1 and "--format csv: the exporter of qrlora-csv failed (AttributeError: " in ran.err
    assert len(ran.err.strip().splitlines()) == 1 and not (tmp_path / "acme.csv").exists()


def test_help_shows_its_options_under_its_name(packages: Path, tmp_path: Path) -> None:
    text = run(["export", "--help"], packages, tmp_path).out
    csv_options = text.partition("Options of --format csv:")[2].partition("Options of --format")[0]
    assert "--separator [comma|semicolon]" in csv_options and "--no-header" in csv_options
    assert "--padding-free" not in csv_options


def test_the_example_is_the_one_of_the_documentation() -> None:
    page = (ROOT / "docs" / "extending.md").read_text("utf-8")
    for file in ("pyproject.toml", "qrlora_csv.py"):
        assert (EXAMPLE / file).read_text("utf-8").strip() in page, file
    assert all(point.name != "csv" for point in importlib.metadata.entry_points(group="qrlora_deploy.exporters"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"separator": "dot"}, "unknown separator 'dot'; choose from comma, semicolon"),
        ({"digits": 18}, "digits must be at least 1 and at most 17, not 18"),
        ({"digits": "9"}, "digits must be a number, not '9'"),
    ],
)
def test_a_caller_is_held_to_the_limits_that_the_command_line_shows(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    exporter = importlib.import_module("qrlora_csv").EXPORTER
    assert make_options(exporter, {"separator": "semicolon", "digits": 17}).digits == 17
    with pytest.raises(InputError, match=message):
        make_options(exporter, given)
