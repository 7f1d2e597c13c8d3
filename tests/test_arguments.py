"""The library speaks of its own arguments, and a command shows them as its options."""

import ast
import functools
import inspect
import re
from pathlib import Path

import click
import pytest

import qrlora_deploy as qr
from qrlora_deploy.api.options import FleetTrainOptions, TrainOptions, WarmupOptions
from qrlora_deploy.bench.settings import BenchSettings
from qrlora_deploy.cli.group import COMMANDS, cli, option_of
from qrlora_deploy.errors import InputError, argument, options_for_arguments
from qrlora_deploy.exporting.options import facts_of
from qrlora_deploy.exporting.registry import all_exporters
from qrlora_deploy.runtime import GenerationRequest, GenerationSession, Predictor, Sampling
from qrlora_deploy.serving.assembly import AssemblyOptions
from qrlora_deploy.serving.ray.options import RayServerOptions
from qrlora_deploy.serving.ray.scaling import Scaling
from qrlora_deploy.serving.server import ServerOptions
from qrlora_deploy.training.settings import TrainSettings
from tests.cli.running import run_here
from tests.test_imports import MODULES, inside

LIBRARY = {name: path for name, path in MODULES.items() if not inside(name, "qrlora_deploy.cli")}

JOBS = (
    qr.combine,
    qr.convert,
    qr.export,
    qr.factorize,
    qr.merge,
    qr.open_predictor,
    qr.project,
    qr.rebase,
    qr.train,
    qr.train_fleet,
    qr.unmerge,
    qr.warmup,
    Predictor.predict,
    GenerationSession,
    GenerationSession.open,
)
KEYWORDS = (
    *(TrainOptions, FleetTrainOptions, WarmupOptions, BenchSettings, AssemblyOptions, ServerOptions),
    *(RayServerOptions, Scaling, GenerationRequest, Sampling),
)
"""What the public functions take as `**settings`, and the settings of a benchmark, of a server and of an answer."""


@functools.cache
def options() -> frozenset[str]:
    """Every option of the command line, those of exporters too, and positional arguments, in capitals."""
    context = click.Context(cli)
    commands = [cli.get_command(context, name) for name in COMMANDS]
    parameters = [parameter for command in commands if command for parameter in command.get_params(context)]
    named = {name for parameter in parameters for name in parameter.opts if name.startswith("--")}
    return frozenset(named | {item.human_readable_name for item in parameters if isinstance(item, click.Argument)})


def literals(path: Path) -> list[tuple[int, str]]:
    """Line and text of the strings of a module that are no documentation; parts of an f-string each alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    ]


def calls_of_argument(tree: ast.AST) -> list[ast.Call]:
    """The calls `argument(...)` in a module."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "argument"]


def arguments(path: Path) -> set[str]:
    """The names that a module writes as `argument("name")`."""
    named = [node.args[0] for node in calls_of_argument(ast.parse(path.read_text(encoding="utf-8")))]
    return {node.value for node in named if isinstance(node, ast.Constant)}


@pytest.mark.parametrize("name", LIBRARY)
def test_no_text_of_the_library_names_an_option(name: str) -> None:
    known = options()
    for line, text in literals(LIBRARY[name]):
        # A whole command line to copy is one for everybody, and `--format=csv` belongs to another program.
        beside = re.sub(r"qrlora-deploy [^\n`]*", "", text)
        found = [option for option in re.findall(r"--[a-z][a-z0-9-]*(?![=\w-])", beside) if option in known]
        assert not found, (
            f"{LIBRARY[name]}:{line}: {found[0]} is an option; write argument(...) of qrlora_deploy.errors"
        )


def test_what_messages_name_is_an_argument_and_an_option() -> None:
    named = set().union(*map(arguments, LIBRARY.values()))
    taken = {name for job in JOBS for name in inspect.signature(job).parameters}
    taken |= {name for keywords in KEYWORDS for name in keywords.__annotations__ | inspect.get_annotations(keywords)}
    taken |= {name for base in TrainSettings.__mro__ for name in inspect.get_annotations(base)}
    taken |= {name for exporter in all_exporters() for name in facts_of(exporter.options)}
    assert len(named) > 30 and named - taken == set()
    assert {option_of(name) for name in named} - options() == set()


@pytest.mark.parametrize("name", LIBRARY)
def test_a_message_is_made_when_it_is_needed(name: str) -> None:
    # One that is made with the module speaks to whoever imports it first.
    module = ast.parse(LIBRARY[name].read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    later = {id(inner) for function in functions for inner in ast.walk(function)}
    assert [node.lineno for node in calls_of_argument(module) if id(node) not in later] == []


def test_a_caller_reads_of_arguments_and_a_user_of_options() -> None:
    def message() -> str:
        return (
            f"{argument('rank', 3)}, {argument('head', 'output')}, {argument('evaluation')}, {argument('resume', True)}"
        )

    assert message() == "rank=3, head='output', evaluation, resume=True"
    with options_for_arguments(option_of):
        assert message() == "--rank 3, --head output, --eval, --resume"
        assert argument("peers", ("hf", "peft")) == "--peer hf, peft"
    assert argument("peers", ("hf", "peft")) == "peers=('hf', 'peft')"


def test_the_running_command_is_asked_first() -> None:
    assert option_of("base", "bench") == "--base"
    assert option_of("base", "train") == "BASE"
    assert option_of("output", "train") == "--output"  # not -o
    assert option_of("targets", "export") == "--target"  # of factorize
    assert option_of("padding_free", "predict") == "--padding-free"  # of an exporter


def test_one_error_has_two_words(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^last_layers must be between 1 and 2, not 3$"):
        qr.factorize(tiny_base, last_layers=3)
    ran = run_here("factorize", tiny_base, "--last-layers", 3, "-o", "b.safetensors", cwd=tmp_path)
    assert (ran.code, ran.err) == (2, "Error: --last-layers must be between 1 and 2, not 3\n")
    # Messages of the same process speak of arguments again when the command has ended.
    with pytest.raises(InputError, match="^precision is no option of format='peft'"):
        qr.export(tiny_base, "b.safetensors", tmp_path / "new", coefficients="a", format="peft", precision="fp16")
