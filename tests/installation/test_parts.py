"""Parts of an installation: the table fits pyproject.toml, and a missing one is named with the way to it."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from qrlora_deploy.cli.group import COMMANDS
from qrlora_deploy.errors import MissingPartError, QrloraError
from qrlora_deploy.inspection.doctor import examine, parts
from qrlora_deploy.installation import parts as table
from qrlora_deploy.installation.parts import OF_COMMAND, PARTS, lacking, missing_part, need, need_for_command

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SPELT = {
    "sklearn": "scikit-learn",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
}


def packages(lines: list[str]) -> set[str]:
    return {re.split(r"[\[>=; ]", line)[0].lower().replace("-", "_") for line in lines}


@pytest.mark.parametrize("part", PARTS)
def test_modules_are_those_that_the_extra_brings(part: str) -> None:
    brought = packages(PROJECT["optional-dependencies"][part])
    named = {SPELT.get(module, module).replace("-", "_") for module in PARTS[part]}
    # uvicorn does without uvloop, and gRPC's packages bring protobuf.
    assert named == brought - {"qrlora_deploy", "uvloop", "protobuf"}


def test_the_base_install_has_no_framework_and_the_card_is_whole() -> None:
    base = packages(PROJECT["dependencies"])
    assert base == {"click", "numpy", "pydantic", "rich", "safetensors", "tokenizers", "watchfiles"}
    extras = PROJECT["optional-dependencies"]
    everything = base.union(*(packages(extras[part]) for part in ("train", "export", "bench", "gpu")))
    assert everything >= {"torch", "transformers", "onnx", "onnxruntime_gpu", "optimum", "safetensors", "click"}
    assert extras["all"] == ["qrlora-deploy[train,export,bench,serve,llm,gpu]"]
    assert "qrlora-deploy[train,export,bench,gpu]" in extras["quickstart"]


def test_every_command_with_a_part_is_there() -> None:
    assert set(COMMANDS) - set(OF_COMMAND) == {"inspect", "combine", "doctor", "keys", "customers"}
    # The client is a library alone, object stores are asked for where a URL is given, spans and Ray are options, chats
    # are data, and the quickstart for decoders needs no base that is installed.
    options = {"client", "ray", "store", "otel", "llm", "quickstart"}
    assert set(OF_COMMAND) < set(COMMANDS) and set().union(*OF_COMMAND.values()) == set(PARTS) - options


@pytest.mark.parametrize(
    ("module", "command", "told"),
    [
        ("torch", "train", "PyTorch, [train]'"),
        ("torch", "export", "PyTorch, [export]'"),
        ("torch.nn", "merge", "PyTorch, [train]'"),
        ("datasets", "export", "datasets, [train]'"),
        ("matplotlib.figure", "inspect", "matplotlib, [bench]'"),
        ("pyarrow", "bench", "pyarrow, [bench]'"),
        ("opentelemetry", "serve", "opentelemetry, [otel]'"),
        ("onnxruntime", "predict", "ONNX Runtime, [cpu]' (or [gpu] for CUDA)"),
    ],
)
def test_the_line_names_command_package_and_extra(module: str, command: str, told: str) -> None:
    package, extra = told.split(", ")
    line = missing_part(ModuleNotFoundError(f"No module named {module!r}", name=module), command)
    assert line == f"`{command}` needs {package}, which is not installed; pip install 'qrlora-deploy{extra}"


def test_a_module_of_no_part_is_a_mistake_of_ours() -> None:
    assert (
        missing_part(
            ModuleNotFoundError("No module named 'qrlora_deploy.nothing'", name="qrlora_deploy.nothing"), "train"
        )
        is None
    )


def test_what_is_not_installed_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "PARTS", PARTS | {"train": ("click", "torch", "not_there")})  # type: ignore[operator]
    need("train", "a thing", ["click"])
    with pytest.raises(MissingPartError) as caught:
        need("train", "qrlora_deploy.training")
    assert isinstance(caught.value, QrloraError) and isinstance(caught.value, ModuleNotFoundError)
    assert (caught.value.name, caught.value.exit_code, caught.value.kind) == ("not_there", 2, "missing_part")
    line = "qrlora_deploy.training needs not_there, which is not installed; pip install 'qrlora-deploy[train]'"
    assert str(caught.value) == line
    need_for_command("doctor")
    with pytest.raises(MissingPartError, match=r"^`quickstart` needs .*'qrlora-deploy\[quickstart\]'$"):
        need_for_command("quickstart")


def test_a_module_within_a_package_that_is_not_there_is_lacking() -> None:
    assert lacking(["no_package_of_this_name.inner.module", "json.decoder", "json.nothing"]) == [
        "no_package_of_this_name.inner.module",
        "json.nothing",
    ]


def test_doctor_says_which_parts_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray is in an environment of its own, by .ci/ray_only.
    assert all(item.works for item in parts() if item.name != "part ray")
    monkeypatch.setitem(PARTS, "train", ("torch", "no_module_of_this_name"))  # type: ignore[call-overload]
    assert lacking(PARTS["train"]) == ["no_module_of_this_name"]
    found = {item.name: item for item in examine().findings if item.group == "part"}
    assert found["part train"].works is False and found["part train"].advice == "pip install 'qrlora-deploy[train]'"
    assert found["part export"].works and found["part export"].detail == "installed"


def test_the_metadata_of_this_environment_is_of_this_project() -> None:
    assert importlib.metadata.version("qrlora-deploy")
