"""What the documentation names is there: options of commands, modules, tests and pages."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from qrlora_deploy.cli.group import cli
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_a_page_names_is_there(page: Path) -> None:
    context = click.Context(cli)
    for words in commands(page):
        command = cli.get_command(context, words[0])
        assert command is not None, f"{page.name}: no command {words[0]}"
        if isinstance(command, click.Group) and not words[1].startswith("-"):
            command = command.get_command(context, words[1])
            assert command is not None, f"{page.name}: {words[0]} has no {words[1]}"
        parameters = command.get_params(click.Context(command))
        known = {name for parameter in parameters for name in parameter.opts}
        named = {word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1}
        assert named <= known | {"--help"}, f"{page.name}: {words}"


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
