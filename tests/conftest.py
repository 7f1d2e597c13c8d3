"""Fixtures shared by all tests: a base small enough for any machine, its basis and a customer.

The objects are built once per session. Tests that change a file copy it to `tmp_path` first.
"""

import os

# Before any import of torch, transformers or tokenizers: the tests need no network, and thread
# pools only slow down matrices of 32 columns.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from qrlora_deploy.formats.basis import Basis, write_basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from tests.tiny import SENTENCES, save_base

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples

TINY_TARGETS = ("query", "value")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where PyTorch finds no CUDA device, and say why."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            build = torch.version.cuda or "none"
            pytest.skip(f"needs a CUDA GPU: torch {torch.__version__} (CUDA build: {build}) finds no device")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a seeded, random BERT classifier: 2 layers, 32 wide, 4 labels, with its tokenizer."""
    return save_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_basis(tiny_base: Path) -> Basis:
    """Basis of the query and value projections of `tiny_base` at tau = 0.5."""
    from qrlora_deploy.factorization.from_checkpoint import factorize
    from qrlora_deploy.models.checkpoint import open_checkpoint
    from qrlora_deploy.models.targets import choose_targets
    from qrlora_deploy.rank_rules.rule import RankRule

    checkpoint = open_checkpoint(str(tiny_base))
    return factorize(checkpoint, choose_targets(checkpoint.skeleton(), TINY_TARGETS), RankRule(tau=0.5))


@pytest.fixture(scope="session")
def tiny_basis_file(tiny_basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_basis` as a file."""
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    write_basis(tiny_basis, path)
    return path


@pytest.fixture(scope="session")
def tiny_customer(tiny_base: Path, tiny_basis: Basis, tiny_basis_file: Path) -> Coefficients:
    """A customer of `tiny_base` whose coefficients are all non-zero and move the logits clearly."""
    from qrlora_deploy.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(tiny_base))
    random = np.random.default_rng(7)
    signs = random.choice([-1.0, 1.0], tiny_basis.total_rank)
    return Coefficients(
        values=(signs * random.uniform(0.5, 1.5, tiny_basis.total_rank)).astype(np.float32),
        basis_digest=tiny_basis.digest,
        base_name=str(tiny_base),
        base_digest=checkpoint.digest,
        task=checkpoint.task,
        labels=checkpoint.labels,
        basis_file=str(tiny_basis_file),
        training={"seed": 7},
    )


@pytest.fixture(scope="session")
def tiny_customer_file(tiny_customer: Coefficients, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_customer` as a file."""
    path = tmp_path_factory.mktemp("customer") / "acme.safetensors"
    write_coefficients(tiny_customer, path)
    return path


@pytest.fixture(scope="session")
def texts() -> "Examples":
    """The sentences of the tiny model."""
    from qrlora_deploy.data.examples import Examples

    return Examples(list(SENTENCES), None, ["travel"] * len(SENTENCES), "sentences")


@pytest.fixture(scope="session")
def exported(
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    texts: "Examples",
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A merged bundle of the tiny customer."""
    from exporters.onnx import export_merged
    from qrlora_deploy.export.registry import ExportJob
    from qrlora_deploy.models.checkpoint import open_checkpoint

    output = tmp_path_factory.mktemp("bundles") / "acme"
    export_merged(ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, output, tiny_customer, texts=texts))
    return output


@pytest.fixture(scope="session")
def switchable(tiny_base: Path, tiny_basis: Basis, texts: "Examples", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A switchable bundle of the tiny base, with room for heads of six labels."""
    from exporters.onnx import export_switchable
    from qrlora_deploy.export.registry import ExportJob
    from qrlora_deploy.models.checkpoint import open_checkpoint

    output = tmp_path_factory.mktemp("bundles") / "switchable"
    export_switchable(ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, output, texts=texts, head_labels=6))
    return output


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a fresh copy of the bundle."""

    def copy() -> Path:
        return Path(shutil.copytree(exported, tmp_path / "acme"))

    return copy
