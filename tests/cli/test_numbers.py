"""Numbers that make no sense are refused by the name of their option, before anything is read or made."""

from pathlib import Path

import click
import pytest

from exporters.head_labels import MAX_HEAD_LABELS
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.bench.settings import BenchSettings
from qrlora_deploy.cli import cli
from qrlora_deploy.cli.group import COMMANDS
from qrlora_deploy.errors import InputError
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.registry import rule_of
from qrlora_deploy.runtime.sessions.session import MAX_THREADS, open_session
from qrlora_deploy.runtime.table.table import CoefficientTable
from qrlora_deploy.training.settings import TrainSettings
from tests.cli.running import run_here

ODD = ("inf", "-inf", "nan", "-1", str(10**18), str(10**30), "1" * 5000, "1e999")

NEEDED = {
    "factorize": "base -o new",
    "warmup": "base --data good.tsv -o new",
    "train": "base --basis basis.safetensors --data good.tsv -o new",
    "train-fleet": "base --basis basis.safetensors --data good.tsv --customer-column id -o new",
    "export": "base --basis basis.safetensors -o new",
    "project": "base --base base --basis basis.safetensors -o new",
    "rebase": "base --to basis.safetensors -o new",
    "predict": "bundle --text a",
    "generate": "bundle --prompt a",
    "bench": "bundle",
    "serve": "bundle",
    "quickstart": "--out new",
    "doctor": "--plan base --customers 1",
}
"""What else each command with numbers must be given."""


MEANT = {
    ("generate", "--presence-penalty", "-1"),
    ("generate", "--frequency-penalty", "-1"),
    ("generate", "--seed", str(10**18)),
}
"""What is odd elsewhere and has a meaning here: tokens that shall come again, a seed of 64 bits."""


def command_of(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


NUMBERS = [
    (name, parameter.opts[0])
    for name in COMMANDS
    for parameter in command_of(name).get_params(click.Context(command_of(name)))
    if isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType)
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder in which every name exists and holds nothing: no number gets as far as reading it."""
    for folder in ("base", "bundle"):
        (tmp_path / folder).mkdir()
    for file in ("basis.safetensors", "good.tsv"):
        (tmp_path / file).touch()
    return tmp_path


def test_the_numbers_were_found() -> None:
    assert {name for name, _ in NUMBERS} == set(NEEDED) and len(NUMBERS) > 30


@pytest.mark.parametrize(("command", "option"), NUMBERS)
def test_every_number_has_bounds(place: Path, command: str, option: str) -> None:
    for odd in ODD:
        if (command, option, odd) in MEANT:
            continue
        shown = run_here(command, *NEEDED[command].split(), f"{option}={odd}", cwd=place)
        assert shown.code == 2, (odd, shown.err)
        line = shown.err.splitlines()[-1]
        assert line.startswith("Error: ") and option in line and len(line) < 500, line
        assert not (place / "new").exists()


@pytest.mark.parametrize(
    "line",
    ["--batch 1000000000", "--batch 10000000 --length 4096", "--seconds 1e9", "--threads 1000000000", "--workers 5000"],
)
def test_bench_refuses_what_would_take_all_memory_or_never_end(place: Path, line: str) -> None:
    shown = run_here("bench", "bundle", *line.split(), cwd=place)
    assert shown.code == 2 and line.split()[0] in shown.err and len(shown.err.splitlines()) == 1, shown.err


@pytest.mark.parametrize("text", ["(" * 100_000, "a{99999999999}", "a" * 50_000, "(a", "[a-" * 10_000])
def test_targets_that_are_no_expression(tiny_base: Path, tmp_path: Path, text: str) -> None:
    shown = run_here("factorize", tiny_base, "-o", "new", "--target", text, cwd=tmp_path)
    assert shown.code == 2 and len(shown.err.splitlines()) == 1 and len(shown.err) < 500, shown.err[:1000]
    assert "--target" in shown.err or "no layer is called" in shown.err
    assert not (tmp_path / "new").exists()


def test_weights_that_are_no_numbers(tiny_customer_file: Path, tmp_path: Path) -> None:
    for odd in ("nan", "inf", "-inf", "1e999", "x", "1" * 5000, "1e39", ""):
        shown = run_here("combine", f"{tiny_customer_file}:{odd}", "-o", "new", cwd=tmp_path)
        assert shown.code == 2 and "weight" in shown.err and len(shown.err.splitlines()) == 1, shown.err
        assert len(shown.err) < 500 and not (tmp_path / "new").exists()


def test_the_library_has_the_same_bounds(tiny_base: Path, tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    for name, values in {
        "epochs": (0, 2**62),
        "batch_size": (-1, 10**18),
        "max_length": (0, 10**18),
        "patience": (0, 10**18),
        "learning_rate": (nan, inf, -1.0),
        "head_learning_rate": (nan, inf, 0.0),
        "seed": (-1, 2**32),
    }.items():
        for value in values:
            with pytest.raises(InputError, match=f"{name} must be"):
                TrainSettings(**{name: value})  # type: ignore[arg-type]
    for tau, rank in ((nan, None), (inf, None), (None, 10**30)):
        with pytest.raises(InputError, match="must be"):
            rule_of(tau, rank)
    for name in ("seconds", "p99_budget_ms", "idle_seconds", "swaps_per_s"):
        for value in (nan, inf, 0.0):
            with pytest.raises(InputError, match=f"{name} must be above 0"):
                BenchSettings(bundles=(tmp_path,), **{name: value})  # type: ignore[arg-type]


def test_tables_and_sessions_of_absurd_sizes() -> None:
    for rows in (2**31, 2**62, 10**30):
        with pytest.raises(InputError, match="rows at most"):
            CoefficientTable(lambda count: pytest.fail("memory is asked for"), rows=rows)
    for threads in (-1, MAX_THREADS + 1, 10**9):
        with pytest.raises(InputError, match="threads must be"):
            open_session(Path("nowhere.onnx"), threads=threads)
    for labels in (-1, MAX_HEAD_LABELS + 1, 10**18):
        with pytest.raises(InputError, match="head_labels must be"):
            OnnxOptions(head_labels=labels)


def test_no_expression_is_too_deep_for_the_library(tiny_base: Path) -> None:
    from qrlora_deploy.models.checkpoint import open_checkpoint

    model = open_checkpoint(str(tiny_base)).skeleton()
    with pytest.raises(InputError, match="is not a regular expression") as caught:
        choose_targets(model, ["(" * 100_000])
    assert len(str(caught.value)) < 500
