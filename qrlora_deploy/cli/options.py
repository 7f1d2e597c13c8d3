"""Options that several commands share, and what every command does around its body."""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from qrlora_deploy.cli.output import Output, show
from qrlora_deploy.cli.ranges import COUNT, RATE, WholeRange
from qrlora_deploy.errors import InputError
from qrlora_deploy.installation.parts import need_for_command
from qrlora_deploy.tasks.options import AUTO, OPTIONS

if TYPE_CHECKING:
    from qrlora_deploy.runtime.sessions.buckets import Buckets

Command = TypeVar("Command", bound=Callable[..., Any])

PLAIN_NAME = re.compile(r"[\w.]+")
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)
BY_COEFFICIENTS = "2.76 / sqrt(number of coefficients), at most 4.3 / sqrt(adapted layers x steps), at most 0.3"
"""What `training.settings.default_rate` gives, in words."""


class CustomerId(click.ParamType):
    """A customer's id, by the one rule for files, requests and keys.

    Args:
        everyone: `*` is one, too.
    """

    name = "id"

    def __init__(self, everyone: bool = False) -> None:
        self._everyone = everyone

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The id, or a usage error that names the option."""
        from qrlora_deploy.formats.customer_files import check_customer_id

        if not (self._everyone and value == "*"):
            try:
                check_customer_id(value)
            except InputError as error:
                self.fail(str(error), param, ctx)
        return value


def common(function: Callable[..., Output]) -> Callable[..., None]:
    """Add `--json` and `--debug`, and print the `Output` that the command returns.

    A part of the installation that the command needs and that is missing is told before any work.
    While the command runs, what a library prints goes to stderr: stdout holds results only.
    """

    @functools.wraps(function)
    def wrapper(as_json: bool, **arguments: Any) -> None:
        stdout, context = sys.stdout, click.get_current_context()
        need_for_command(str(context.command.name))
        if context.obj is not None:
            context.obj.begin(arguments.get("output"))
        with redirect_stdout(sys.stderr):
            output = function(**arguments)
        show(output, as_json, stdout)
        if output.failure is not None:
            raise output.failure

    debug = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_debug,
        help="Show the traceback of an error, and the libraries' warnings.",
    )
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(debug(wrapper))


def tell_if_interrupted(kept: Callable[[], str]) -> None:
    """Say by `kept` what an interruption of the running command leaves, and how to go on; empty: nothing."""
    context = click.get_current_context(silent=True)
    if context is not None and context.obj is not None:
        context.obj.kept = kept


def _set_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and context.obj is not None:
        context.obj.debug = True


def output_option(what: str) -> Callable[[Command], Command]:
    """`-o/--output`, required."""
    return click.option("-o", "--output", required=True, type=ANY_PATH, help=what)


def device_option(choices: tuple[str, ...] = ("cpu", "cuda")) -> Callable[[Command], Command]:
    """`--device`; the first choice is the default."""
    return click.option(
        "--device", type=click.Choice(choices), default=choices[0], show_default=True, help="Where PyTorch computes."
    )


def provider_option(function: Command) -> Command:
    """`--provider`."""
    return click.option(
        "--provider",
        type=click.Choice(["cpu", "cuda", "tensorrt"]),
        default="cpu",
        show_default=True,
        help="Execution provider of ONNX Runtime; refused, not replaced, where it does not load.",
    )(function)


def seed_option(function: Command) -> Command:
    """`--seed`."""
    return click.option(
        "--seed", type=WholeRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of every random choice."
    )(function)


FOUND = (
    "May be left out with a coefficients file, which names its basis: a file of that name is looked for beside it and "
    "in the current folder."
)


def basis_option(required: bool) -> Callable[[Command], Command]:
    """`--basis`; where it is not required, the coefficients file remembers it."""
    remembered = "" if required else f" {FOUND}"
    return click.option("--basis", type=EXISTING_FILE, required=required, help=f"Basis file.{remembered}")


def coefficients_option(required: bool = True) -> Callable[[Command], Command]:
    """`--coefficients`."""
    return click.option("--coefficients", type=EXISTING_FILE, required=required, help="The customer's file.")


def column_options(function: Command) -> Command:
    """`--text-column` and `--label-column`."""
    text = click.option(
        "--text-column",
        help="Column of the text, or two of a pair with a comma between them; text is found without it.",
    )
    label = click.option("--label-column", help="Column of the label; label is found without it.")
    return text(label(function))


def training_options(epochs: int, batch_size: int, rate: str) -> Callable[[Command], Command]:
    """What warm-up and training have in common; `rate` tells the library's default of `--learning-rate`."""
    options = [
        click.option("--data", required=True, help="Training data: TSV, CSV, JSONL, Parquet, or a data set name."),
        click.option("--eval", "evaluation", help="Held-out data; the best checkpoint by its metric is kept."),
        column_options,
        click.option("--epochs", type=COUNT, default=epochs, show_default=True, help="Passes over all rows."),
        click.option("--batch-size", type=COUNT, default=batch_size, show_default=True, help="Rows of a step."),
        click.option("--learning-rate", type=RATE, help=f"Peak; it rises to it and falls to 0. Default: {rate}."),
        click.option(
            "--max-length",
            type=WholeRange(2, 2**31 - 1),
            default=128,
            show_default=True,
            help="Tokens of a text that are read; the rest is cut.",
        ),
        click.option(
            "--task",
            type=click.Choice([AUTO, *OPTIONS]),
            default=AUTO,
            show_default=True,
            help=f"What the labels are: {'; '.join(f'{name}: {what}' for name, what in OPTIONS.items())}. auto: "
            "multi-label where a row has a list, a regression where all are numbers and one has a decimal point.",
        ),
        device_option(("auto", "cpu", "cuda")),
        seed_option,
    ]

    return together(options)


def customer_options(head: str, resume: str) -> Callable[[Command], Command]:
    """What training one customer and many have in common beside `training_options`; texts for two of them differ."""
    options = [
        click.option("--head", type=click.Choice(["frozen", "output"]), default="frozen", show_default=True, help=head),
        click.option(
            "--patience",
            type=COUNT,
            default=3,
            show_default=True,
            help="End after so many epochs without a gain on --eval.",
        ),
        click.option("--resume", is_flag=True, help=resume),
        click.option(
            "--metric", help="Chooses the best epoch on --eval; by default the task's first, such as accuracy."
        ),
        click.option(
            "--head-learning-rate", type=RATE, help="Peak of the last projection, with --head output; default: 1e-3."
        ),
        click.option(
            "--tune-thresholds", is_flag=True, help="Choose each label's threshold on --eval, for the best F1."
        ),
    ]
    return together(options)


def together(options: Sequence[Callable[[Any], Any]]) -> Callable[[Command], Command]:
    """Several decorators as one, the first one outermost."""

    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def refuse_idle(names: Sequence[str], used: bool, unless: str) -> None:
    """Refuse options that the user gave and that would do nothing, since other options leave no use for them.

    Args:
        names: parameters of the running command.
        used: whether they do something.
        unless: says when they would: "there is --eval".

    Raises:
        InputError: one was given; the line says when it does something.
    """
    context = click.get_current_context()
    # A parameter that was left out is no mistake, whatever its default.
    idle = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if idle and not used:
        options = [parameter.opts[0] for parameter in context.command.params if parameter.name in idle]
        verb = "does" if len(options) == 1 else "do"
        raise InputError(f"{' and '.join(options)} {verb} nothing unless {unless}")


def refuse_idle_training(evaluation: str | None, head: str) -> None:
    """`refuse_idle` for what `train` and `train-fleet` have in common."""
    refuse_idle(
        ["metric", "patience", "tune_thresholds"],
        evaluation is not None,
        "there is --eval, which says what epoch is the best",
    )
    refuse_idle(["head_learning_rate"], head == "output", "the head is trained, by --head output")


def split_targets(values: tuple[str, ...]) -> list[str]:
    """`query,value` is two names; anything that is not plain names is one regular expression.

    Raises:
        InputError: a name is empty.
    """
    patterns: list[str] = []
    for value in values:
        parts = [part.strip() for part in value.split(",")]
        if "" in parts:
            raise InputError(f"--target {value!r} holds an empty name; write names as query,value")
        patterns += parts if all(PLAIN_NAME.fullmatch(part) for part in parts) else [value]
    return patterns


def buckets_of(text: str) -> "Buckets":
    """The shapes of `--buckets`.

    Raises:
        InputError: they are none.
    """
    from qrlora_deploy.runtime.sessions.buckets import Buckets

    sizes = [[part.strip() for part in side.split(",")] for side in text.split(":")]
    if len(sizes) != 2 or not all(part.isascii() and part.isdecimal() and len(part) < 7 for part in sum(sizes, [])):
        raise InputError(f"--buckets {text!r:.80} must be ROWS:LENGTHS, such as 1,8,32:32,128")
    return Buckets(tuple(map(int, sizes[0])), tuple(map(int, sizes[1])))
