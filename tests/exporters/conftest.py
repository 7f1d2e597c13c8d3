"""One exported bundle for all tests here; those that change a bundle copy it first."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qrlora_deploy.basis import Basis
from qrlora_deploy.coefficients import Coefficients
from qrlora_deploy.training.data import Examples
from tests.tiny import SENTENCES


@pytest.fixture(scope="session")
def texts() -> Examples:
    """The sentences of the tiny model."""
    return Examples(list(SENTENCES), None, ["travel"] * len(SENTENCES), "sentences")


@pytest.fixture(scope="session")
def exported(
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    texts: Examples,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A merged bundle of the tiny customer."""
    from exporters.onnx import export_merged
    from qrlora_deploy.checkpoint import open_checkpoint

    output = tmp_path_factory.mktemp("bundles") / "acme"
    export_merged(open_checkpoint(str(tiny_base)), tiny_basis, tiny_customer, output, texts)
    return output


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a fresh copy of the bundle."""

    def copy() -> Path:
        return Path(shutil.copytree(exported, tmp_path / "acme"))

    return copy
