"""Docstrings are in Google style as mkdocstrings parses it: one error and one attribute a line."""

import ast
import builtins
import re
from pathlib import Path

import pytest

from qrlora_deploy import errors
from tests.test_imports import MODULES, inside

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields", "Examples")
OWN = {name: path for name, path in MODULES.items() if inside(name, "qrlora_deploy")}


def docstrings(path: Path) -> list[tuple[str, ast.AST, str]]:
    """Name, node and docstring of everything in a module that has one."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds)]
    return [(getattr(node, "name", path.stem), node, ast.get_docstring(node) or "") for node in nodes]


def entries(text: str, section: str) -> list[str]:
    """The first lines of a section's entries; those that go on are indented further."""
    match = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    return [line[4:] for line in match.group(1).splitlines() if re.match(r"    \S", line)] if match else []


@pytest.mark.parametrize("name", OWN)
def test_each_error_has_a_line_and_a_class(name: str) -> None:
    for function, _node, text in docstrings(OWN[name]):
        for entry in entries(text, "Raises"):
            kind, colon, _ = entry.partition(": ")
            assert colon, f"{function}: {entry}"
            assert hasattr(errors, kind) or hasattr(builtins, kind) or kind in OWN[name].read_text("utf-8"), entry
        assert not re.search(r"[.;] [A-Z]\w*(Error|Failed): ", text), function


@pytest.mark.parametrize("name", OWN)
def test_each_attribute_and_argument_has_a_line(name: str) -> None:
    for owner, node, text in docstrings(OWN[name]):
        for section in ("Attributes", "Args"):
            for entry in entries(text, section):
                assert re.match(r"\*{0,2}\w+: ", entry), f"{owner}: {entry}"
        if isinstance(node, ast.ClassDef):
            fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}  # type: ignore[union-attr]
            inline = set(re.findall(r"[.;] (\w+): ", text))
            assert not fields & inline, f"{owner}: {fields & inline}"


@pytest.mark.parametrize("name", OWN)
def test_sections_have_the_names_that_are_parsed(name: str) -> None:
    for owner, _node, text in docstrings(OWN[name]):
        found = set(
            re.findall(
                r"^(Arg|Args|Arguments|Attribute|Attributes|Raise|Raises|Return|Returns|Example|Examples):$", text, re.M
            )
        )
        assert found <= set(SECTIONS), f"{owner}: {found}"
