"""Imports point one way: cli, then the tasks, then the formats; the runtime stands alone and --help is light."""

import ast
import importlib
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qrlora_deploy", "exporters")

ALLOWED = {
    "qrlora_deploy.errors": {"text"},
    "qrlora_deploy.text": set(),
    "qrlora_deploy.strict": {"errors", "text"},
    "qrlora_deploy.reading": {"errors"},
    "qrlora_deploy.temporary": set(),
    "qrlora_deploy.outputs": {"errors", "temporary"},
    "qrlora_deploy.files": {"errors", "outputs", "reading", "temporary"},
    "qrlora_deploy.rank_rule": {"errors"},
    "qrlora_deploy.pivoted_qr.orthonormal": set(),
    "qrlora_deploy.pivoted_qr.kernel": set(),
    "qrlora_deploy.pivoted_qr.panel": {"pivoted_qr.kernel"},
    "qrlora_deploy.pivoted_qr.order": {"pivoted_qr.orthonormal", "pivoted_qr.panel"},
    "qrlora_deploy.factorization": {"errors", "rank_rule", "pivoted_qr.order", "pivoted_qr.orthonormal"},
    "qrlora_deploy.basis": {"errors", "files", "rank_rule", "strict"},
    "qrlora_deploy.coefficients": {"errors", "files", "basis", "strict"},
    "qrlora_deploy.config_file": {"errors", "reading", "strict"},
    "qrlora_deploy.capacity": {"errors"},
    "qrlora_deploy.families": {"capacity", "errors"},
    "qrlora_deploy.targets": {"errors", "families"},
    "qrlora_deploy.adapter": {"errors", "basis", "targets"},
}
"""The lower layers, whole: what each may import of the project, wherever in the file it does."""


def modules(*folders: str) -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = modules(*PACKAGES)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a module imports; `from a import b` counts as `a.b` where that is a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in _outside_functions(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = names & MODULES.keys()
            found |= inner if len(inner) == len(names) else inner | {node.module}
    return found


def _outside_functions(node: ast.AST) -> list[ast.AST]:
    children = [child for child in ast.iter_child_nodes(node) if not _runs_later(child)]
    return children + [inner for child in children for inner in _outside_functions(child)]


def _runs_later(node: ast.AST) -> bool:
    # What stands under `if TYPE_CHECKING` is never imported at run time.
    typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def project(names: set[str]) -> set[str]:
    return {name for name in names if any(inside(name, package) for package in PACKAGES)}


def test_the_project_was_found() -> None:
    assert {"qrlora_deploy.cli.train", "exporters.onnx.export", "qrlora_deploy.runtime"} <= MODULES.keys()
    assert imports(MODULES["qrlora_deploy.checkpoint"]) >= {"torch", "qrlora_deploy.basis", "huggingface_hub"}
    assert "huggingface_hub" not in imports(MODULES["qrlora_deploy.checkpoint"], top_level_only=True)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported(name: str) -> None:
    if name == "qrlora_deploy.pivoted_qr.kernel":
        pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA alone")
    if not name.endswith("__main__"):  # it would run
        importlib.import_module(name)


@pytest.mark.parametrize("name", [name for name in MODULES if inside(name, "qrlora_deploy.runtime")])
def test_the_runtime_stands_alone(name: str) -> None:
    found = imports(MODULES[name])
    heavy = {found_name for found_name in found if found_name.split(".")[0] in ("torch", "transformers", "onnx")}
    assert heavy == set()
    modules = ("errors", "text", "files", "reading", "strict", "coefficients", "config_file", "temporary")
    own = {f"qrlora_deploy.{name}" for name in modules}
    shared = ("qrlora_deploy.runtime", "qrlora_deploy.tokens")
    assert {other for other in project(found) if not any(inside(other, package) for package in shared)} <= own


@pytest.mark.parametrize("name", [name for name in MODULES if inside(name, "qrlora_deploy.tokens")])
def test_what_cuts_texts_needs_a_tokenizer_alone(name: str) -> None:
    found = imports(MODULES[name])
    assert not {other.split(".")[0] for other in found} & {"torch", "transformers", "onnxruntime"}
    assert all(inside(other, "qrlora_deploy.tokens") or other == "qrlora_deploy.errors" for other in project(found))


def test_only_verify_reaches_into_the_exporters() -> None:
    users = {
        name
        for name, path in MODULES.items()
        if not inside(name, "exporters") and any(inside(other, "exporters") for other in imports(path))
    }
    assert users == {"qrlora_deploy.cli.verify"}


def test_nothing_but_the_command_line_imports_the_command_line() -> None:
    users = {
        name
        for name, path in (MODULES | modules("benchmarks")).items()
        if not inside(name, "qrlora_deploy.cli") and any(inside(other, "qrlora_deploy.cli") for other in imports(path))
    }
    assert users == set()


@pytest.mark.parametrize(("name", "allowed"), ALLOWED.items())
def test_lower_layers_import_nothing_of_the_higher_ones(name: str, allowed: set[str]) -> None:
    assert project(imports(MODULES[name])) <= {f"qrlora_deploy.{other}" for other in allowed}


def test_training_and_merging_know_nothing_of_serving() -> None:
    tasks = [name for name in MODULES if inside(name, "qrlora_deploy.training")]
    tasks += [f"qrlora_deploy.{name}" for name in ("folding", "merging", "shards", "provenance")]
    wrong = {
        (name, other)
        for name in tasks
        for other in imports(MODULES[name])
        if any(inside(other, package) for package in ("qrlora_deploy.runtime", "qrlora_deploy.quickstart", "exporters"))
    }
    assert wrong == set()


def test_there_is_no_cycle() -> None:
    graph = {name: project(imports(path)) - {name} for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", [name for name in MODULES if inside(name, "qrlora_deploy.cli")])
def test_commands_import_their_library_only_when_they_run(name: str) -> None:
    light = {"qrlora_deploy", "qrlora_deploy.errors", "qrlora_deploy.text"}
    found = project(imports(MODULES[name], top_level_only=True))
    assert {other for other in found if not inside(other, "qrlora_deploy.cli")} <= light


def loaded_by(code: str) -> set[str]:
    """Top-level packages in `sys.modules` after `code`, in an interpreter of its own."""
    report = (
        "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    return set(json.loads(answer.stderr.splitlines()[-1]))


def test_help_of_every_command_loads_no_framework() -> None:
    code = """
from qrlora_deploy.cli.group import COMMANDS, cli
for arguments in [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]:
    cli.main(arguments, standalone_mode=False)
"""
    heavy = {"torch", "transformers", "onnxruntime", "onnx", "datasets", "sklearn", "scipy", "matplotlib", "numpy"}
    assert loaded_by(code) & heavy == set()


def test_the_runtime_loads_neither_torch_nor_transformers() -> None:
    found = loaded_by("import qrlora_deploy.runtime")
    assert "onnxruntime" in found
    heavy = {"torch", "transformers", "onnx", "datasets", "sklearn", "scipy", "matplotlib", "exporters"}
    assert found & heavy == set()


def test_what_an_operator_looks_at_files_with_loads_neither_torch_nor_transformers() -> None:
    found = loaded_by("import qrlora_deploy.inspecting, qrlora_deploy.combining, qrlora_deploy.locating")
    assert found & {"torch", "transformers", "onnx", "onnxruntime", "datasets", "exporters"} == set()


def test_bench_loads_neither_torch_nor_transformers() -> None:
    names = [name for name in MODULES if inside(name, "qrlora_deploy.bench")]
    found = loaded_by(f"import {', '.join(names)}")
    assert "onnxruntime" in found
    assert found & {"torch", "transformers", "onnx", "datasets"} == set()
