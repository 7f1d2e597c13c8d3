"""The examples of the docstrings and of some pages run as they are shown, in a folder with what they name."""

import contextlib
import doctest
import importlib
import re
import shutil
from pathlib import Path

import pytest

import qrlora_deploy
from tests.ready import make_basis, make_bundle, make_customer
from tests.test_imports import MODULES, ROOT, inside
from tests.tiny import LABELS, SENTENCES, save_base

TEXTS = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items() if inside(name, "qrlora_deploy")}
WITH_EXAMPLES = [name for name, text in TEXTS.items() if re.search(r"^\s*>>> ", text, re.MULTILINE)]
PAGES = ("api.md", "peft.md")


def examples_of(module: str) -> list[doctest.DocTest]:
    """Every docstring of a module that shows a session, with `qr` at hand as in the documentation."""
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module), globs={"qr": qrlora_deploy})
    return [test for test in found if test.examples]


EXAMPLES = [pytest.param(test, id=test.name) for module in WITH_EXAMPLES for test in examples_of(module)]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its basis, a customer, a bundle, and rows of two customers, under the names that examples use."""
    folder = tmp_path_factory.mktemp("examples")
    base = save_base(folder / "base", tokens=128)
    basis = make_basis(base)
    basis.save(folder / "basis.safetensors")
    make_customer(base, basis, folder / "basis.safetensors").save(folder / "customers" / "acme.safetensors")
    make_bundle(base, basis, None, folder / "bundle")
    rows = [(text, LABELS[number % 4], f"customer-{number % 2}") for number, text in enumerate(SENTENCES * 4)]
    (folder / "all.tsv").write_text(table([("text", "label", "id"), *rows]))
    for name in ("acme", "dev"):
        (folder / f"{name}.tsv").write_text(table([("text", "label"), *(row[:2] for row in rows)]))
    return folder


def table(rows: list[tuple[str, ...]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


@pytest.fixture
def folder(shelf: Path, tmp_path: Path) -> Path:
    """A copy of the shelf, to be written to."""
    return Path(shutil.copytree(shelf, tmp_path / "work"))


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_a_docstring_does_what_it_shows(example: doctest.DocTest, folder: Path) -> None:
    told: list[str] = []
    with contextlib.chdir(folder):
        ran = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert ran.attempted
    assert not ran.failed, "".join(told)


def test_every_public_function_and_both_files_have_an_example() -> None:
    named = {param.values[0].name.removeprefix("qrlora_deploy.").rpartition(".")[2] for param in EXAMPLES}
    functions = {name for name in qrlora_deploy.__all__ if name in qrlora_deploy._PLACES["api.training"]}
    functions |= {"factorize", "merge", "unmerge", "combine", "export", "open_predictor", "attach", "load_customer"}
    assert functions <= named


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page: str, folder: Path) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    shutil.copy(folder / "customers" / "acme.safetensors", folder / "customers" / "other.safetensors")
    if page == "api.md":  # it makes them itself
        shutil.rmtree(folder / "bundle")
        shutil.rmtree(folder / "customers")
        (folder / "basis.safetensors").unlink()
    with contextlib.chdir(folder):
        for block in blocks:
            exec(compile(block, page, "exec"), names)
