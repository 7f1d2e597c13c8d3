"""Old import paths work for one release, with a warning."""

import importlib
import subprocess
import sys

import pytest

from qrlora_deploy.deprecated.moved import MOVED

FORMER_MODULES = {
    "qrlora_deploy.merging": "merge",
    "qrlora_deploy.exporting": "find_exporter",
    "qrlora_deploy.factorization": "factorize_weight",
    "qrlora_deploy.runtime.table": "CoefficientTable",
    "qrlora_deploy.runtime.bundle": "open_bundle",
    "qrlora_deploy.training.trunk": "split_model",
}
"""Modules whose name is a package now, and something each of them offered."""


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_gives_the_module_of_today(old: str, new: str) -> None:
    if old == "qrlora_deploy.pivoted_qr.kernel":
        pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA alone")
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new};"):
        assert importlib.import_module(old) is importlib.import_module(new)


@pytest.mark.parametrize(("package", "name"), FORMER_MODULES.items())
def test_a_package_offers_what_the_module_of_its_name_offered(package: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{package}.{name} is now"):
        assert callable(getattr(importlib.import_module(package), name))
    assert not hasattr(importlib.import_module(package), "nothing_of_this_name")


def test_names_of_today_warn_of_nothing() -> None:
    code = "import qrlora_deploy.runtime, qrlora_deploy.merging.checkpoints, exporters.onnx, qrlora_deploy.cli.group"
    ended = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:qrlora_deploy", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
