"""The doctor tries what it reports, and says what to do where something is missing."""

import base64
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from qrlora_deploy.errors import FileFormatError, InputError, ProviderError
from qrlora_deploy.inspection import doctor
from qrlora_deploy.inspection.doctor import REINSTALL_TORCH, Finding, devices, examine, providers, versions
from qrlora_deploy.version import __version__

HAS_GPU = torch.cuda.is_available()


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_the_probe_is_a_model_of_one_product() -> None:
    model = onnx.load_from_string(base64.b64decode(doctor.PROBE))
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]


def test_the_least_that_is_needed_works_here() -> None:
    steps: list[tuple[str, int, int]] = []
    health = examine(lambda *step: steps.append(step))
    assert health.usable and steps == [("doctor", step, 5) for step in range(1, 6)]
    assert {finding.group for finding in health.findings} == {"version", "part", "resource", "device", "provider"}
    assert all(finding.detail and "\n" not in finding.detail + finding.advice for finding in health.findings)


def test_versions_are_those_that_are_installed() -> None:
    found = by_name(versions())
    assert found["qrlora-deploy"].detail == __version__
    assert found["torch"].detail.split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"].detail.startswith(".".join(map(str, sys.version_info[:3])))
    assert all(finding.works is None for finding in found.values() if finding.name != "onnxruntime twice")


def test_two_builds_of_onnxruntime_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime": "1.23.0", "onnxruntime-gpu": "1.23.0"}
    monkeypatch.setattr(doctor, "_version", lambda name: installed.get(name, ""))
    fault = versions()[-1]
    assert (fault.name, fault.works) == ("onnxruntime twice", False)
    assert fault.advice.startswith("pip uninstall -y onnxruntime onnxruntime-gpu")
    del installed["onnxruntime"]
    assert "onnxruntime twice" not in by_name(versions())


def test_the_cpu_provider_runs_a_model() -> None:
    found = by_name(providers())
    assert list(found) == ["cpu", "cuda", "tensorrt"]
    assert found["cpu"] == Finding("provider", "cpu", True, "loads and opens a model")


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_gpu_cuda_is_said_not_to_work(capfd: pytest.CaptureFixture[str]) -> None:
    found = by_name([*devices(), *providers()])
    assert found["torch cuda"].works is False and found["cuda"].works is False and found["tensorrt"].works is False
    assert "CUDAExecutionProvider was asked for" in found["cuda"].detail
    # The pages that ONNX Runtime writes about a missing library stay off the screen.
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_with_a_gpu_torch_reaches_it() -> None:
    found = by_name(devices())
    assert found["gpu"].works is True and found["torch cuda"].works is True
    assert torch.cuda.get_device_name(0) in found["torch cuda"].detail


@pytest.mark.parametrize("kind", [ProviderError, FileFormatError])
def test_a_cpu_provider_that_fails_makes_the_machine_unusable(
    monkeypatch: pytest.MonkeyPatch, kind: type[InputError]
) -> None:
    def refuse(model: Path, provider: str) -> None:
        raise kind(f"{provider} is broken\nmore")

    monkeypatch.setattr("qrlora_deploy.runtime.sessions.session.open_session", refuse)
    health = examine()
    found = by_name(list(health.findings))
    assert health.usable is False
    assert found["cpu"] == Finding(
        "provider", "cpu", False, "cpu is broken more", "pip install --force-reinstall 'qrlora-deploy[cpu]'"
    )
    assert found["cuda"].advice == ""


def test_a_missing_torch_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    found = by_name(devices())["torch cuda"]
    assert (found.works, found.detail) == (False, "No module named 'torch'")
    assert found.advice.endswith("pip install 'qrlora-deploy[train,export]'")


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize(("build", "advice"), [(None, REINSTALL_TORCH), ("13.0", "update the NVIDIA driver")])
def test_a_gpu_that_torch_does_not_reach_has_advice(
    monkeypatch: pytest.MonkeyPatch, build: str | None, advice: str
) -> None:
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA X, 580.1, 1024 MiB\n\n")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(torch.version, "cuda", build)
    found = by_name(devices())
    assert found["gpu"] == Finding("device", "gpu", True, "NVIDIA X, 580.1, 1024 MiB")
    assert (found["torch cuda"].works, found["torch cuda"].advice) == (False, advice)


@pytest.mark.parametrize("error", [OSError("gone"), subprocess.TimeoutExpired("nvidia-smi", 20)])
def test_a_driver_that_does_not_answer_is_no_gpu(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", fail)
    assert by_name(devices())["gpu"] == Finding("device", "gpu", False, "no NVIDIA driver answers")


def test_memory_and_disks_are_named_and_little_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.name: finding for finding in doctor.resources()}
    assert {"disk, this folder", "disk, temporary"} <= found.keys()
    usage = shutil.disk_usage(Path.cwd())
    assert f"of {usage.total / 1e9:.1f} GB free" in found["disk, this folder"].detail
    monkeypatch.setattr(doctor, "LITTLE_BYTES", 10**18)
    assert all(finding.works is False and finding.advice for finding in doctor.resources())


def test_a_system_that_does_not_tell_its_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert [finding.name for finding in doctor.resources()] == ["disk, this folder", "disk, temporary"]
