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

ROOMS = (
    "version",
    "errors",
    "deprecated.moved",
    "installation",
    "io",
    "tokenization",
    "chat",
    "data",
    "tasks",
    "rank_rules",
    "formats",
    "models",
    "factorization",
    "merging",
    "projection",
    "training.trunk",
    "training",
    "training.fleet",
    "runtime.host",
    "runtime.bundle",
    "runtime.table",
    "runtime.sessions",
    "runtime.customers",
    "runtime.prediction",
    "runtime.generation",
    "runtime.verification",
    "runtime",
    "serving.refusals",
    "serving.engine",
    "serving",
    "client",
    "inspection",
    "bench",
    "exporting",
    "exporters",
    "api",
    "integrations",
    "quickstart",
    "cli",
    "deprecated",
)
"""Every room, from the lowest to the highest: a module imports of its own room and of lower ones."""


ON_RAY = tuple(f"qrlora_deploy.serving.ray.{name}" for name in ("deployment", "router", "running"))
"""All that import Ray."""


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
    assert imports(MODULES["qrlora_deploy.models.checkpoint"]) >= {"torch", "qrlora_deploy.errors"}
    assert "huggingface_hub" in imports(MODULES["qrlora_deploy.models.hub"])
    assert "huggingface_hub" not in imports(MODULES["qrlora_deploy.models.hub"], top_level_only=True)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported(name: str) -> None:
    if name == "qrlora_deploy.factorization.pivoted_qr.kernel":
        pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA alone")
    if name in ON_RAY:
        pytest.importorskip("ray", reason="needs the extra ray; .ci/ray_only runs it")
    if not name.endswith("__main__"):  # it would run
        importlib.import_module(name)


def test_ray_is_imported_where_it_is_said() -> None:
    assert {name for name, path in MODULES.items() if {one.split(".")[0] for one in imports(path)} & {"ray"}} == {
        *ON_RAY
    }


@pytest.mark.parametrize("name", [name for name in MODULES if inside(name, "qrlora_deploy.runtime")])
def test_the_runtime_stands_alone(name: str) -> None:
    found = imports(MODULES[name])
    heavy = {found_name for found_name in found if found_name.split(".")[0] in ("torch", "transformers", "onnx")}
    assert heavy == set()
    shared = tuple(
        f"qrlora_deploy.{room}"
        for room in ("runtime", "chat", "tokenization", "io", "formats", "tasks", "installation")
    )
    others = {other for other in project(found) if not any(inside(other, package) for package in shared)}
    assert others <= {"qrlora_deploy.errors", "qrlora_deploy.deprecated.moved"}


@pytest.mark.parametrize("name", [name for name in MODULES if inside(name, "qrlora_deploy.tokenization")])
def test_what_cuts_texts_needs_a_tokenizer_alone(name: str) -> None:
    found = imports(MODULES[name])
    assert not {other.split(".")[0] for other in found} & {"torch", "transformers", "onnxruntime"}
    assert all(
        inside(other, "qrlora_deploy.tokenization") or other == "qrlora_deploy.errors" for other in project(found)
    )


def test_exporters_are_found_by_name_and_never_imported() -> None:
    users = {
        name
        for name, path in MODULES.items()
        if not inside(name, "exporters") and any(inside(other, "exporters") for other in imports(path))
    }
    assert {name for name in users if not inside(name, "qrlora_deploy.deprecated")} == set()


def test_nothing_but_the_command_line_imports_the_command_line() -> None:
    users = {
        name
        for name, path in (MODULES | modules("benchmarks")).items()
        if not inside(name, "qrlora_deploy.cli") and any(inside(other, "qrlora_deploy.cli") for other in imports(path))
    }
    assert users == set()


def room_of(name: str) -> str:
    """The room of a module: its longest name in `ROOMS`."""
    short = name.removeprefix("qrlora_deploy.")
    return max((room for room in ROOMS if inside(short, room)), key=len)


def test_no_module_lies_outside_the_rooms() -> None:
    assert {name for name in MODULES if name.count(".") == 1 and name.startswith("qrlora_deploy.")} == {
        f"qrlora_deploy.{room}" for room in ROOMS if "." not in room and room != "exporters"
    }
    root = {path.stem for path in (ROOT / "qrlora_deploy").glob("*.py")}
    assert root == {"__init__", "errors", "version"}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "qrlora_deploy"])
def test_rooms_import_of_lower_rooms_alone(name: str) -> None:
    place = ROOMS.index(room_of(name))
    found = project(imports(MODULES[name])) - {"qrlora_deploy"}
    assert {other for other in found if ROOMS.index(room_of(other)) > place} == set()


def test_training_and_merging_know_nothing_of_serving() -> None:
    higher = ("runtime", "quickstart", "exporters")
    lower = [
        name
        for name in MODULES
        if name != "qrlora_deploy" and room_of(name).split(".")[0] in ("training", "merging", "models")
    ]
    found = {(name, room_of(other)) for name in lower for other in project(imports(MODULES[name])) - {"qrlora_deploy"}}
    assert {(name, room) for name, room in found if room.split(".")[0] in higher} == set()


def test_there_is_no_cycle() -> None:
    graph = {name: project(imports(path)) - {name} for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", [name for name in MODULES if inside(name, "qrlora_deploy.cli")])
def test_commands_import_their_library_only_when_they_run(name: str) -> None:
    names = ("errors", "version", "tasks.options", "installation.parts")
    light = {"qrlora_deploy", *(f"qrlora_deploy.{name}" for name in names)}
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
    found = loaded_by("import qrlora_deploy.runtime as runtime\nfor name in runtime.__all__: getattr(runtime, name)")
    assert "onnxruntime" in found
    heavy = {"torch", "transformers", "onnx", "datasets", "sklearn", "scipy", "matplotlib", "exporters"}
    assert found & heavy == set()


def test_the_runtime_loads_onnx_runtime_when_a_session_is_asked_for() -> None:
    code = "import qrlora_deploy.runtime as runtime\nruntime.open_bundle, runtime.Manifest"
    assert loaded_by(code) & {"onnxruntime", "torch", "transformers", "onnx"} == set()


def test_type_checkers_read_the_names_of_the_runtime() -> None:
    runtime = importlib.import_module("qrlora_deploy.runtime")
    tree = ast.parse(MODULES["qrlora_deploy.runtime"].read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {
        (f"{node.module}".removeprefix("qrlora_deploy.runtime."), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == {(module, name) for module, names in runtime._PLACES.items() for name in names}
    assert sorted(runtime.__all__) == sorted(name for _, name in shown)


def test_what_an_operator_looks_at_files_with_loads_neither_torch_nor_transformers() -> None:
    found = loaded_by(
        "import qrlora_deploy.inspection.describe, qrlora_deploy.merging.combining, qrlora_deploy.models.locating"
    )
    assert found & {"torch", "transformers", "onnx", "onnxruntime", "datasets", "exporters"} == set()


def test_bench_loads_neither_torch_nor_transformers() -> None:
    names = [name for name in MODULES if inside(name, "qrlora_deploy.bench")]
    found = loaded_by(f"import {', '.join(names)}")
    assert "onnxruntime" in found
    assert found & {"torch", "transformers", "onnx", "datasets"} == set()
