"""The group of commands: loads a command when it is used, turns errors into one line and a code.

Exit codes: 0 done; 1 the operation or a check failed; 2 bad input or usage; 130 interrupted, 143 and 129
ended by SIGTERM and SIGHUP.
"""

import errno
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from qrlora_deploy.cli.signals import Terminated, heard, raised_signals
from qrlora_deploy.errors import QrloraError, first_line, options_for_arguments, shortened
from qrlora_deploy.version import __version__

COMMANDS = (
    "quickstart",
    "convert",
    "warmup",
    "factorize",
    "train",
    "train-fleet",
    "project",
    "rebase",
    "inspect",
    "combine",
    "merge",
    "export",
    "verify",
    "predict",
    "generate",
    "pack",
    "customers",
    "serve",
    "bench",
    "keys",
    "doctor",
)
"""In the order of the work; each is a module of this package with a `command`,
`-` as `_`."""

INTERRUPTED = 130

BAD_NAMES = frozenset(
    {errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM}
)
"""What the system says of a file that the user named, and not of the disk."""

NO_MEMORY = ("failed to map segment", "annot allocate memory", "can't allocate memory", "std::bad_alloc")
"""What libraries say, each with an exception of its own, where memory ends while they load or compute."""


@dataclass
class State:
    """What the commands tell the group.

    Attributes:
        command: the name of the one that runs.
        debug: show tracebacks.
        output: what the command writes; None where it writes nothing.
        before: what lay there when the command began.
        kept: says what an interrupted command has kept, and how to go on; None: nothing but what `output` tells.
    """

    command: str | None = None
    debug: bool = False
    output: Path | None = None
    before: tuple[int, int] | None = None
    kept: Callable[[], str] | None = None

    def begin(self, output: Path | None) -> None:
        """The command begins, with this output."""
        self.output, self.before = output, None if output is None else _state_of(output)


class LazyGroup(click.Group):
    """Imports a command's module when it is asked for; a command imports its library when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the work, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None when there is no such name."""
        if cmd_name not in COMMANDS:
            return None
        if isinstance(ctx.obj, State):
            ctx.obj.command = cmd_name
        return _load(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each command with its whole first sentence, which click cuts to a line."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _load(name).get_short_help_str(limit=1000)) for name in COMMANDS])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; messages name options. An EOFError of a library is no Ctrl-D, for which click takes it."""
        try:
            with options_for_arguments(lambda name: option_of(name, ctx.invoked_subcommand)):
                return super().invoke(ctx)
        except EOFError as error:
            raise _EndOfFile from error
        except KeyboardInterrupt as error:
            # Click would print an empty line first.
            raise click.Abort from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; in standalone mode every error ends the process with one line."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        state, code, interrupted = State(), None, None
        try:
            with raised_signals(lambda: _say_interrupted(state)):
                code = super().main(args, prog_name, complete_var, standalone_mode=False, obj=state, **extra)
                sys.stdout.flush()
        except BaseException as error:
            interrupted = _interruption(error)
            if interrupted is None:
                _end_failed(error, state)
        if interrupted is not None:
            # Out of reach of the exception, whose frames hold what was cut short.
            _end_interrupted(state, interrupted)
        # Without standalone mode click returns the code of --help and --version instead of exiting.
        sys.exit(code if isinstance(code, int) else 0)


def option_of(argument: str, running: str | None = None) -> str:
    """The option that sets an argument of the library, as click knows it; a positional argument in capitals.

    Args:
        argument: its name in Python, which is the name of the click parameter.
        running: the command that is asked first. Others come after it, for a message may name what another one was
            given: a bundle that was exported without `--head-labels`.
    """
    for command in (*filter(None, [running]), *COMMANDS):
        for parameter in _load(command).params:
            if parameter.name == argument:
                # Some have a short form beside, such as `-o`, or another spelling behind.
                positional = isinstance(parameter, click.Argument)
                return parameter.human_readable_name if positional else _first_long(parameter.opts)
    from qrlora_deploy.cli.exporter_options import option_name

    return option_name(argument)  # of an exporter, whose options have no other names


def _first_long(names: Sequence[str]) -> str:
    return next((name for name in names if name.startswith("--")), names[0])


def _load(name: str) -> click.Command:
    module = importlib.import_module(f"qrlora_deploy.cli.{name.replace('-', '_')}")
    command: click.Command = module.command
    return command


class _EndOfFile(Exception):
    """An EOFError on its way past click."""


def _interruption(error: BaseException) -> int | None:
    """The exit code where a command was interrupted: what a library raises then is no error of its own."""
    if isinstance(error, Terminated):
        return error.code
    number = heard()
    if number is not None:
        return 128 + number
    return INTERRUPTED if isinstance(error, KeyboardInterrupt | click.Abort) else None


def _say_interrupted(state: State) -> None:
    click.echo(f"Interrupted{_what_is_kept(state)}", err=True)


def _end_interrupted(state: State, code: int) -> NoReturn:
    # Once more Ctrl-C, by an impatient user, changes nothing any more.
    with suppress(KeyboardInterrupt):
        _say_interrupted(state)
    with suppress(KeyboardInterrupt):
        # A thread of a pool whose start was cut short waits for ever, and the interpreter for it, unless the pool
        # is gone by then.
        gc.collect()
    sys.exit(code)


def _what_is_kept(state: State) -> str:
    try:
        told = state.kept() if state.kept is not None else ""
    except OSError:
        return ""
    if not told and state.output is not None:
        told = _what_became_of(state.output, state.before)
    return f"; {told}" if told else ""


def _what_became_of(output: Path, before: tuple[int, int] | None) -> str:
    """In words; outputs come to their place when they are whole."""
    now = _state_of(output)
    if now is None:
        return f"{output} was not written"
    if now == before:
        return f"{output} is as it was before"
    return f"{output} is written" if before is None or now[0] != before[0] else ""


def _state_of(path: Path) -> tuple[int, int] | None:
    """Number and time of what has this name; None where there is nothing."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _end_failed(error: BaseException, state: State) -> NoReturn:
    """End the process with the code of an error, and its line."""
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe has gone; the interpreter's last flush must not complain either.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - lives to the end
        sys.exit(1)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.ctx.get_help(), err=True)
        sys.exit(2)
    if not isinstance(error, Exception):
        raise error
    _fail(error, state)


def _fail(error: Exception, state: State) -> NoReturn:
    if state.debug:
        traceback.print_exception(error)
    line, code = describe_error(error, state.command)
    click.echo(f"Error: {shortened(line)}", err=True)
    sys.exit(code)


def end_at_once(error: Exception) -> None:
    """End the process with an error's line and code, from any thread: what the main thread does never returns."""
    line, code = describe_error(error)
    click.echo(f"Error: {shortened(line)}", err=True)
    os._exit(code)


def describe_error(error: Exception, command: str | None = None) -> tuple[str, int]:
    """The message for the user and the exit code of an exception, which `command` ended with."""
    if isinstance(error, _EndOfFile) and isinstance(error.__cause__, EOFError):
        error = error.__cause__
    if isinstance(error, QrloraError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        from qrlora_deploy.installation.parts import missing_part

        missing = missing_part(error, command)
        if missing is not None:
            return missing, 2
    if isinstance(error, click.ClickException):
        return error.format_message(), 2
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return f"not enough memory: {first_line(error)}; try a smaller --batch-size or another --device", 1
    if any(sign in str(error) for sign in NO_MEMORY):
        return f"not enough memory ({kind}: {error})", 1
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}", 2 if error.errno in BAD_NAMES else 1
    # Without lines of its own: what the user can do about it must stay in sight.
    return f"internal error ({kind}: {shortened(str(error), 300)}); run with --debug to see where, and report it", 1


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qrlora-deploy")
def cli() -> None:
    """QR-LoRA adapters from training to production: one frozen base, a few kilobytes per customer.

    \b
    The way, in order:
      qrlora-deploy warmup BASE --data all.tsv -o base
      qrlora-deploy factorize base -o basis.safetensors
      qrlora-deploy train base --basis basis.safetensors --data acme.tsv -o acme.safetensors
      qrlora-deploy export --merge --coefficients acme.safetensors -o bundle
      qrlora-deploy predict bundle --text "where is my parcel?"
    """
