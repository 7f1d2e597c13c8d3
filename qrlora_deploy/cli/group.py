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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from qrlora_deploy.cli.signals import Terminated, heard, raised_signals
from qrlora_deploy.errors import QrloraError, first_line, shortened
from qrlora_deploy.version import __version__

COMMANDS = (
    "quickstart",
    "warmup",
    "factorize",
    "train",
    "train-fleet",
    "inspect",
    "combine",
    "merge",
    "export",
    "verify",
    "predict",
    "pack",
    "bench",
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
        output: what the command was to write; None where it writes nothing.
        kept: says what an interrupted command has kept, and how to go on; None: nothing but what `output` tells.
    """

    command: str | None = None
    debug: bool = False
    output: Path | None = None
    kept: Callable[[], str] | None = None


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
        module = importlib.import_module(f"qrlora_deploy.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. An EOFError of a library is no Ctrl-D, for which click takes it."""
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise _EndOfFile from error

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
        state = State()
        try:
            with raised_signals():
                code = super().main(args, prog_name, complete_var, standalone_mode=False, obj=state, **extra)
                sys.stdout.flush()
        except (KeyboardInterrupt, click.Abort) as error:
            cause = error if isinstance(error, Terminated) else error.__cause__
            _end_interrupted(state, cause.code if isinstance(cause, Terminated) else INTERRUPTED)
        except BrokenPipeError:
            # The reader of a pipe has gone; the interpreter's last flush must not complain either.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - lives to the end
            sys.exit(1)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help(), err=True)
            sys.exit(2)
        except Exception as error:
            if (number := heard()) is not None:
                # A library that was cut short says so in words of its own.
                _end_interrupted(state, 128 + number)
            _fail(error, state)
        # Without standalone mode click returns the code of --help and --version instead of exiting.
        sys.exit(code if isinstance(code, int) else 0)


class _EndOfFile(Exception):
    """An EOFError on its way past click."""


def _end_interrupted(state: State, code: int) -> NoReturn:
    click.echo(f"Interrupted{_what_is_kept(state)}", err=True)
    # Pools whose start was cut short wait for each other when the interpreter ends, unless they are gone by then.
    gc.collect()
    sys.exit(code)


def _what_is_kept(state: State) -> str:
    try:
        told = state.kept() if state.kept is not None else ""
        if not told and state.output is not None:
            told = f"{state.output} is as it was before" if state.output.exists() else f"{state.output} was not written"
    except OSError:
        return ""
    return f"; {told}" if told else ""


def _fail(error: Exception, state: State) -> NoReturn:
    if state.debug:
        traceback.print_exception(error)
    line, code = describe_error(error, state.command)
    click.echo(f"Error: {shortened(line)}", err=True)
    sys.exit(code)


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
