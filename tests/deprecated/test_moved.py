"""Old import paths work for one release, with a warning."""

import importlib
import subprocess
import sys

import pytest

from qrlora_deploy.deprecated.moved import MOVED
from qrlora_deploy.errors import InputError
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank

FORMER_MODULES = [
    ("qrlora_deploy.merging", "merge"),
    ("qrlora_deploy.exporting", "find_exporter"),
    ("qrlora_deploy.exporting", "ExportJob"),
    ("qrlora_deploy.factorization", "factorize_weight"),
    ("qrlora_deploy.runtime.table", "CoefficientTable"),
    ("qrlora_deploy.runtime.bundle", "open_bundle"),
    ("qrlora_deploy.training.trunk", "split_model"),
    ("qrlora_deploy.models.checkpoint", "check_basis_fits"),
]
"""Modules whose name is a package now, or whose parts have moved, and something each of them offered."""


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_gives_the_module_of_today(old: str, new: str) -> None:
    if old == "qrlora_deploy.pivoted_qr.kernel":
        pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA alone")
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new};"):
        assert importlib.import_module(old) is importlib.import_module(new)


@pytest.mark.parametrize(("package", "name"), FORMER_MODULES)
def test_a_package_offers_what_the_module_of_its_name_offered(package: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{package}.{name} is now"):
        assert callable(getattr(importlib.import_module(package), name))
    assert not hasattr(importlib.import_module(package), "nothing_of_this_name")


def test_the_one_rank_rule_of_old_gives_the_two_of_today() -> None:
    sys.modules.pop("qrlora_deploy.rank_rule", None)
    with pytest.warns(DeprecationWarning, match=r"is now qrlora_deploy\.deprecated\.rank_rule"):
        old = importlib.import_module("qrlora_deploy.rank_rule").RankRule
    assert (old(), old(tau=0.25), old(tau=None, rank=3), old(None, 3)) == (
        EnergyShare(0.5),
        EnergyShare(0.25),
        FixedRank(3),
        FixedRank(3),
    )
    for tau, rank in ((0.5, 3), (None, None)):
        with pytest.raises(InputError, match="give either tau or a rank"):
            old(tau, rank)


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
