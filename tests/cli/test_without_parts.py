"""Each command runs with its own parts alone, and says what is missing without them.

Modules of all other parts are not found in the processes that run here, as where they are not installed.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from qrlora_deploy.installation.parts import NAMES, OF_COMMAND, PARTS
from tests.cli.running import Ran, environment
from tests.tiny import SENTENCES

BARE = """
import importlib.machinery
import sys

AWAY, find = set(sys.argv.pop(1).split(",")), importlib.machinery.PathFinder.find_spec


def find_spec(name, path=None, target=None):
    away = any(name == module or name.startswith(f"{module}.") for module in AWAY)
    return None if away else find(name, path, target)


importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
"""Begins a process in which modules, its first argument, are not found."""

COMMAND = "from qrlora_deploy.cli import main; main()"

COMMANDS = """
from qrlora_deploy.cli import cli
for line in sys.argv[1:]:
    print("runs", line, file=sys.stderr)
    cli.main(line.split(), standalone_mode=False)
"""
"""Commands one after another in one process, which imports libraries once. The first that fails ends it."""

EVERYWHERE = {"huggingface_hub", "fsspec"}
"""`tokenizers` brings them, and the base install that."""


def run_with(parts: tuple[str, ...], *arguments: str, cwd: Path, code: str = COMMAND) -> Ran:
    """Run `code`, which is given `arguments`, where the base install and `parts` are there, and nothing else."""
    there = {module for part in parts for module in PARTS[part]} | EVERYWHERE
    away = {module for modules in PARTS.values() for module in modules} - there
    done = subprocess.run(
        [sys.executable, "-c", BARE + code, ",".join(away), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=240,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Things:
    """What commands are given, by the words in capitals that stand for it in the lines below."""

    places: dict[str, Path]

    def fill(self, line: str) -> str:
        """A command line with the files' own names."""
        return re.sub("[A-Z]{3,}", lambda name: str(self.places[name[0]]), line)


@pytest.fixture
def things(
    tiny_base: Path, tiny_basis_file: Path, tiny_customer_file: Path, exported: Path, switchable: Path, tmp_path: Path
) -> Things:
    folder = tmp_path / "customers"
    folder.mkdir()
    (folder / "acme.safetensors").write_bytes(tiny_customer_file.read_bytes())
    labels = ("travel", "banking", "home", "kitchen")
    rows = [f"{text}\t{labels[index % 4]}" for index, text in enumerate(SENTENCES)]
    (tmp_path / "rows.tsv").write_text("\n".join(["text\tlabel", *rows, ""]), encoding="utf-8")
    names = {
        "BASE": tiny_base,
        "BASIS": tiny_basis_file,
        "CUSTOMER": tiny_customer_file,
        "MERGED": exported,
        "BUNDLE": switchable,
        "CUSTOMERS": folder,
        "ROWS": tmp_path / "rows.tsv",
    }
    return Things(names)


def runs(parts: tuple[str, ...], lines: tuple[str, ...], things: Things, tmp_path: Path) -> None:
    ran = run_with(parts, *map(things.fill, lines), cwd=tmp_path, code=COMMANDS)
    assert ran.code == 0 and ran.err.count("runs ") == len(lines), ran.err


SERVING = (
    "predict MERGED --text rice",
    "predict BUNDLE --customers CUSTOMERS --customer acme --text rice",
    "verify MERGED",
    "verify BUNDLE",
    "pack CUSTOMERS --bundle BUNDLE -o packed.safetensors",
    "inspect BUNDLE",
    "inspect packed.safetensors",
    "doctor",
)

LOOKING = (
    "inspect BASE",
    "inspect BASIS",
    "inspect CUSTOMER",
    "combine CUSTOMER:0.5 CUSTOMERS/acme.safetensors:0.25 -o half.safetensors",
)

MEASURING = (
    "bench BUNDLE --customers CUSTOMERS --labelled labelled --seconds 0.2 --samples 6 --batch 1 --length 8",
    "inspect BASIS --plot picture.png",
)

TRAINING = (
    "factorize BASE --target query -o q.safetensors",
    "train BASE --basis BASIS --data ROWS --eval ROWS --epochs 1 --max-length 32 -o c.safetensors",
    "merge BASE --basis BASIS --coefficients CUSTOMER -o merged",
)

EXPORTING = (
    "export BASE --basis BASIS --data ROWS -o bundle",
    "export BASE --basis BASIS --coefficients CUSTOMER --format peft -o peft",
    "verify MERGED --base BASE --basis BASIS --coefficients CUSTOMER --data ROWS",
)


def test_a_serving_host_needs_a_build_of_onnx_runtime_alone(things: Things, tmp_path: Path) -> None:
    runs(("cpu",), SERVING, things, tmp_path)


def test_files_are_looked_at_without_any_part(things: Things, tmp_path: Path) -> None:
    runs((), LOOKING, things, tmp_path)


@pytest.mark.makes
def test_bench_needs_no_pytorch(things: Things, tmp_path: Path) -> None:
    (tmp_path / "labelled").mkdir()
    (tmp_path / "labelled" / "acme.tsv").write_bytes((tmp_path / "rows.tsv").read_bytes())
    runs(("bench", "cpu"), MEASURING, things, tmp_path)
    assert (tmp_path / "bench-report" / "report.html").is_file()


@pytest.mark.makes
def test_training_needs_its_part_alone(things: Things, tmp_path: Path) -> None:
    runs(("train",), TRAINING, things, tmp_path)


@pytest.mark.makes
def test_exports_need_their_part_and_a_build_of_onnx_runtime(things: Things, tmp_path: Path) -> None:
    runs(("export", "cpu"), EXPORTING, things, tmp_path)


LINES = {
    "quickstart": "quickstart --out tour",
    "warmup": "warmup BASE --data ROWS -o base",
    "convert": "convert BASIS -o made",
    "factorize": "factorize BASE -o basis.safetensors",
    "train": "train BASE --basis BASIS --data ROWS -o customer.safetensors",
    "train-fleet": "train-fleet BASE --basis BASIS --data ROWS --customer-column label -o fleet",
    "project": "project BASE --base BASE --basis BASIS -o projected",
    "rebase": "rebase CUSTOMERS --to BASIS -o rebased",
    "merge": "merge BASE --basis BASIS --coefficients CUSTOMER -o merged",
    "export": "export BASE --basis BASIS -o bundle",
    "verify": "verify MERGED",
    "predict": "predict MERGED --text rice",
    "generate": "generate MERGED --prompt rice",
    "pack": "pack CUSTOMERS --bundle BUNDLE -o packed.safetensors",
    "bench": "bench BUNDLE",
    "serve": "serve BUNDLE --check",
}
"""A line of each command that needs a part."""


@pytest.mark.parametrize("command", OF_COMMAND)
def test_without_its_part_a_command_says_in_one_line_what_installs_it(
    command: str, things: Things, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    ran = run_with((), *things.fill(LINES[command]).split(), cwd=tmp_path)
    part = OF_COMMAND[command][0]
    extra = "quickstart" if command == "quickstart" else part
    package = NAMES.get(PARTS[part][0], PARTS[part][0])
    told = f"Error: `{command}` needs {package}, which is not installed; pip install 'qrlora-deploy[{extra}]'"
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith(told) and ran.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("parts", "line", "told"),
    [
        (("cpu",), "verify MERGED --coefficients CUSTOMER", "`verify --coefficients` needs PyTorch"),
        (("cpu",), "inspect BASIS --plot picture.png", "`inspect --plot` needs matplotlib"),
        pytest.param(
            ("cpu", "serve"),
            "serve BUNDLE --otel --check",
            "`serve --otel` needs OpenTelemetry's SDK",
            marks=pytest.mark.skipif(find_spec("starlette") is None, reason="needs the extra serve"),
        ),
    ],
)
def test_an_option_without_its_part_says_so_too(
    parts: tuple[str, ...], line: str, told: str, things: Things, tmp_path: Path
) -> None:
    ran = run_with(parts, *things.fill(line).split(), cwd=tmp_path)
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert told in ran.err and "which is not installed; pip install 'qrlora-deploy[" in ran.err


@pytest.mark.parametrize(
    ("module", "extra"),
    [("qrlora_deploy.training.trainer", "train"), ("qrlora_deploy.factorization.from_checkpoint", "train")]
    + [("qrlora_deploy.runtime.sessions.session", "cpu"), ("qrlora_deploy.quickstart.run", "train")]
    + [("qrlora_deploy.serving.tracing.sending", "otel")],
)
def test_a_program_that_imports_a_room_is_told_the_same(module: str, extra: str, tmp_path: Path) -> None:
    last = run_with((), cwd=tmp_path, code=f"import {module}").err.splitlines()[-1]
    assert last.startswith("qrlora_deploy.errors.MissingPartError: qrlora_deploy.")
    assert f"which is not installed; pip install 'qrlora-deploy[{extra}]'" in last


def test_doctor_without_onnx_runtime_says_which_build_to_install(tmp_path: Path) -> None:
    ran = run_with((), "doctor", "--json", cwd=tmp_path)
    assert ran.code == 1 and ran.err.count("\n") == 1
    found = {item["name"]: item for item in ran.json["findings"] if item["group"] == "provider"}
    assert [item["works"] for item in found.values()] == [False] * 3
    assert found["cpu"]["advice"] == "pip install 'qrlora-deploy[gpu]' (or [cpu] where there is no GPU)"
