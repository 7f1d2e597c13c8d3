"""The group of commands: help, errors as one line, exit codes."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

from qrlora_deploy.cli import cli
from qrlora_deploy.cli.group import COMMANDS, describe_error
from qrlora_deploy.cli.output import Output, cell, plain, size_text
from qrlora_deploy.cli.sections import SectionedCommand
from qrlora_deploy.errors import CheckFailed, InputError
from qrlora_deploy.version import __version__
from tests.cli.running import ROOT, environment


def ended(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments, prog_name="qrlora-deploy")
    return caught.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example" in shown and f"qrlora-deploy {name}" in shown


@pytest.mark.parametrize("name", ["serve", "bench", "generate"])
def test_the_help_of_many_options_has_sections(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, SectionedCommand)
    assert ended([name, "--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    titles = [line.removesuffix(":") for line in shown if line.endswith(":") and not line.startswith(" ")]
    assert titles == list(command.sections.values())
    options = [
        parameter for parameter in command.get_params(click.Context(command)) if parameter.param_type_name != "argument"
    ]
    assert all(any(line.lstrip().startswith(option.opts[0]) for line in shown) for option in options)


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended([]) == 2
    shown = capsys.readouterr().err
    assert "Commands:" in shown and "factorize" in shown and "Error" not in shown


def test_a_terminal_without_utf8_gets_escapes(tmp_path: Path) -> None:
    (tmp_path / "caf\xe9").mkdir()
    for arguments, code in ((["inspect", "caf\xe9"], 2), (["doctor", "--json"], 0)):
        done = subprocess.run(
            [sys.executable, "-m", "qrlora_deploy.cli", *arguments],
            capture_output=True,
            cwd=tmp_path,
            env=environment(PYTHONIOENCODING="ascii"),
            check=False,
        )
        assert done.returncode == code and b"internal error" not in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Makes `doctor` raise what it is given."""

    def install(error: BaseException) -> None:
        def examine(progress: object) -> None:
            raise error

        monkeypatch.setattr("qrlora_deploy.inspection.doctor.examine", examine)

    return install


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.tsv: no such file"), 2, "Error: a.tsv: no such file"),
        (CheckFailed("logits differ"), 1, "Error: logits differ"),
        (click.UsageError("give --data"), 2, "Error: give --data"),
        (OSError(28, "No space left on device", "out"), 1, "Error: out: No space left on device"),
        (PermissionError(13, "Permission denied", "in"), 2, "Error: in: Permission denied"),
        (OSError(36, "File name too long", "x" * 5000), 2, "Error: xxx"),
        (click.UsageError("y" * 50_000), 2, "Error: yyy"),
        (KeyError("y\n" * 50_000), 1, "Error: internal error (KeyError: 'y"),
        (InputError("two\nlines and \x1b[31mred"), 2, "Error: two lines and \\x1b[31mred"),
        (MemoryError(), 1, "Error: not enough memory"),
        (EOFError("Ran out of input"), 1, "Error: internal error (EOFError: Ran out of input); run with --debug"),
        (ImportError("libx.so: failed to map segment from shared object"), 1, "Error: not enough memory (Import"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "Error: not enough memory (RuntimeError: "),
        (KeyError("x"), 1, "Error: internal error (KeyError: 'x'); run with --debug"),
    ],
)
def test_an_error_is_one_line(failing, capsys, error: Exception, code: int, line: str) -> None:  # type: ignore[no-untyped-def]
    failing(error)
    assert ended(["doctor"]) == code
    shown = capsys.readouterr()
    assert shown.err.startswith(line) and len(shown.err.splitlines()) == 1 and len(shown.err) < 500
    assert ("run with --debug" in shown.err) == ("internal error" in line)
    assert shown.out == ""


def test_debug_shows_where(failing, capsys) -> None:  # type: ignore[no-untyped-def]
    failing(InputError("a.tsv: no such file"))
    assert ended(["doctor", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.splitlines()[-1] == "Error: a.tsv: no such file"


def test_an_interrupt_is_130(failing, capsys) -> None:  # type: ignore[no-untyped-def]
    failing(KeyboardInterrupt())
    assert ended(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = f"{sys.executable} -m qrlora_deploy.cli doctor --json | head -c 1 > {Path('/dev/null')}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_describe_error_knows_every_kind() -> None:
    assert describe_error(click.BadParameter("no")) == ("Invalid value: no", 2)


def test_values_are_shown_on_one_line() -> None:
    assert cell("a\nb\x07") == "a b\\x07"
    assert cell({"a": 1.23456, "b": None, "c": True}) == "a 1.235, b -, c yes"
    assert cell(list("abcdefghij")) == "a, b, c, d, e, f, g, h, and 2 more"
    assert [size_text(size) for size in (7, 2500, 91_800_000, 3 * 10**9)] == ["7 B", "2.5 kB", "91.8 MB", "3.0 GB"]


def test_a_value_of_any_length_is_shown_shortened() -> None:
    assert all(len(cell(value)) < 2100 for value in ("y" * 50_000, ["y" * 50_000] * 9, {"y" * 50_000: "y" * 50_000}))
    assert cell("y" * 2000) == "y" * 2000


def test_json_holds_no_nan() -> None:
    assert plain({"a": float("nan"), "b": (1, Path("x"))}) == {"a": None, "b": [1, "x"]}
    assert plain(Output(record=1.5))["record"] == 1.5
