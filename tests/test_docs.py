"""What the documentation names is there: options of commands, modules, tests and pages."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from qrlora_deploy.cli.group import COMMANDS, cli
from tests.test_imports import ON_RAY

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, kind: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == kind]


def commands(page: Path) -> list[list[str]]:
    """Words of every line of a code block that calls the command line; continued lines are one."""
    text = "\n".join(blocks(page, "")).replace("\\\n", " ")
    text += "\n" + "\n".join(re.findall(r"^    (qrlora-deploy .*)$", page.read_text("utf-8"), re.MULTILINE))
    lines = [line.removeprefix("$ ") for line in text.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("qrlora-deploy ")]


def inline(page: Path) -> list[list[str]]:
    """Words of every `command --option` within a sentence."""
    found = [text.split() for text in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text("utf-8"))]
    words = [part[1:] if part[:1] == ["qrlora-deploy"] else part for part in found]
    return [part for part in words if part[0:1] and part[0] in COMMANDS and any(word[:2] == "--" for word in part)]


def unknown_options(words: list[str]) -> set[str]:
    """Options in the words behind `qrlora-deploy` that the command does not have."""
    context = click.Context(cli)
    command = cli.get_command(context, words[0])
    assert command is not None, f"no command {words[0]}"
    if isinstance(command, click.Group) and len(words) > 1 and not words[1].startswith("-"):
        command = command.get_command(context, words[1])
        assert command is not None, f"{words[0]} has no {words[1]}"
    parameters = command.get_params(click.Context(command))
    known = {name for parameter in parameters for name in parameter.opts} | {"--help", "-h"}
    named = {word.partition("=")[0].rstrip(",.;:") for word in words if word.startswith("-") and len(word) > 1}
    return named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_a_page_names_is_there(page: Path) -> None:
    for words in [*commands(page), *inline(page)]:
        assert not unknown_options(words), f"{page.name}: {words}"


def all_commands() -> list[tuple[str, click.Command]]:
    """Every command and every part of a group, by what is typed."""
    tops = [(name, cli.get_command(click.Context(cli), name)) for name in COMMANDS]
    parts = [
        (f"{name} {part}", command)
        for name, group in tops
        if isinstance(group, click.Group)
        for part, command in group.commands.items()
    ]
    return [(name, command) for name, command in [*tops, *parts] if command is not None]


@pytest.mark.parametrize(("name", "command"), all_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_option_says_what_it_is_for_and_every_example_of_the_help_is_of_this_version(
    name: str, command: click.Command
) -> None:
    for parameter in command.get_params(click.Context(command)):
        assert not isinstance(parameter, click.Option) or parameter.help, f"{name} {parameter.opts}"
    examples = [line.strip() for line in (command.help or "").replace("\\\n", " ").splitlines()]
    shown = [shlex.split(line[line.index("qrlora-deploy") :])[1:] for line in examples if "qrlora-deploy " in line]
    assert any(words[: len(name.split())] == name.split() for words in shown) or isinstance(command, click.Group)
    for words in shown:
        assert not unknown_options(words), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_import_of_an_example_works(page: Path) -> None:
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qrlora_deploy"):
                if node.module in ON_RAY:
                    pytest.importorskip("ray", reason="needs the extra ray; .ci/ray_only runs it")
                exec(ast.unparse(node), {})


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    for name in re.findall(r"`(tests/[\w/.-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_benchmark_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"python -m (benchmarks\.\w+)", text):
        script = ROOT / name.replace(".", "/")
        runs = script.is_dir() and (script / "__main__.py").is_file()
        assert name == "benchmarks.NAME" or runs or script.with_suffix(".py").is_file(), f"{page.name}: {name}"
    for path in re.findall(r"(?:^|\s|[`(]|\.\./)(benchmarks/[\w/.-]+\.\w+)", text):
        assert (ROOT / path).is_file(), f"{page.name}: {path}"


def test_every_page_is_in_the_index_and_on_the_site() -> None:
    index, site = (ROOT / "docs" / "index.md").read_text("utf-8"), (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in PAGES[1:]:
        assert page.name == "index.md" or f"({page.name})" in index, page.name
        assert f"docs/{page.name}" in site, page.name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200
