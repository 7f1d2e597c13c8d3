"""Parts of an installation: the table fits pyproject.toml, and a missing one is named with the way to it."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from qrlora_deploy.cli.group import COMMANDS
from qrlora_deploy.inspection.doctor import examine, parts
from qrlora_deploy.inspection.parts import OF_COMMAND, PARTS, lacking, missing_part
from tests.cli.running import run_here

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SPELT = {"sklearn": "scikit-learn"}


def packages(lines: list[str]) -> set[str]:
    return {re.split(r"[\[>=; ]", line)[0].lower().replace("-", "_") for line in lines}


@pytest.mark.parametrize("part", PARTS)
def test_modules_are_those_that_the_extra_brings(part: str) -> None:
    brought = packages(PROJECT["optional-dependencies"][part])
    named = {SPELT.get(module, module).replace("-", "_") for module in PARTS[part]}
    assert named <= brought and brought - named <= {"qrlora_deploy", "huggingface_hub"}


def test_the_base_install_has_no_framework_and_the_card_is_whole() -> None:
    base = packages(PROJECT["dependencies"])
    assert base == {"click", "numpy", "pydantic", "rich", "safetensors", "tokenizers", "watchfiles"}
    extras = PROJECT["optional-dependencies"]
    everything = base.union(*(packages(extras[part]) for part in ("train", "export", "bench", "gpu")))
    assert everything >= {"torch", "transformers", "onnx", "onnxruntime_gpu", "optimum", "safetensors", "click"}
    assert extras["all"] == ["qrlora-deploy[train,export,bench,gpu]"] and extras["all"][0] in extras["quickstart"]


def test_every_command_with_a_part_is_there() -> None:
    assert set(OF_COMMAND) <= set(COMMANDS) and set(OF_COMMAND.values()) <= set(PARTS)


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("torch", "train", "[train]"),
        ("torch", "export", "[export]"),
        ("torch.nn", "merge", "[train]"),
        ("torch", "quickstart", "[quickstart]"),
        ("matplotlib.figure", "inspect", "[bench]"),
        ("pyarrow", "bench", "[bench]"),
        ("onnxruntime", "predict", "[cpu]' (or [gpu] for CUDA)"),
    ],
)
def test_the_line_names_command_module_and_extra(module: str, command: str, extra: str) -> None:
    line = missing_part(ModuleNotFoundError(f"No module named {module!r}", name=module), command)
    assert line is not None and f"`{command}` needs {module.split('.')[0]}, which is not installed" in line
    assert f"pip install 'qrlora-deploy{extra}" in line


def test_a_module_of_no_part_is_a_mistake_of_ours() -> None:
    assert (
        missing_part(
            ModuleNotFoundError("No module named 'qrlora_deploy.nothing'", name="qrlora_deploy.nothing"), "train"
        )
        is None
    )


def test_a_command_without_its_part_ends_with_2_and_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What `import torch` meets where it is not installed.
    for name in [name for name in sys.modules if name == "qrlora_deploy.merging.checkpoints"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("b", "c"):
        (tmp_path / name).touch()
    shown = run_here("merge", "base", "--basis", "b", "--coefficients", "c", "-o", "out", cwd=tmp_path)
    assert shown.code == 2 and shown.err.count("\n") == 1 and "`merge` needs torch" in shown.err
    assert "pip install 'qrlora-deploy[train]'" in shown.err


def test_doctor_says_which_parts_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(item.works for item in parts())
    monkeypatch.setitem(PARTS, "train", ("torch", "no_module_of_this_name"))  # type: ignore[call-overload]
    assert lacking("train") == ["no_module_of_this_name"]
    found = {item.name: item for item in examine().findings if item.group == "part"}
    assert found["train"].works is False and found["train"].advice == "pip install 'qrlora-deploy[train]'"
    assert found["export"].works and found["export"].detail == "installed"


def test_the_metadata_of_this_environment_is_of_this_project() -> None:
    assert importlib.metadata.version("qrlora-deploy")
