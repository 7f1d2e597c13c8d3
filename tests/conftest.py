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

import hypothesis
import pytest

from qrlora_deploy.formats.basis import Basis, read_basis, write_basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from tests import ready
from tests.tiny import SENTENCES, save_base

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples

# A property holds however long the machine takes to look.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest tests first, by `timeout` and then `slow`: several processes end at about one time."""
    longest: dict[Path, tuple[float, bool]] = {}
    for item in items:
        limit = item.get_closest_marker("timeout")
        length = (float(limit.args[0]) if limit else 0.0, item.get_closest_marker("slow") is not None)
        longest[item.path] = max(length, longest.get(item.path, length))
    items.sort(key=lambda item: longest[item.path], reverse=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where PyTorch finds no CUDA device, and say why."""
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch", reason="needs a CUDA GPU, and PyTorch to find it")
        if not torch.cuda.is_available():
            build = torch.version.cuda or "none"
            pytest.skip(f"needs a CUDA GPU: torch {torch.__version__} (CUDA build: {build}) finds no device")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a seeded, random BERT classifier: 2 layers, 32 wide, 4 labels, with its tokenizer."""
    return ready.READY / ready.BASE if ready.READY else save_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_basis(tiny_base: Path) -> Basis:
    """Basis of the query and value projections of `tiny_base` at tau = 0.5."""
    return read_basis(ready.READY / ready.BASIS) if ready.READY else ready.make_basis(tiny_base)


@pytest.fixture(scope="session")
def tiny_basis_file(tiny_basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_basis` as a file."""
    if ready.READY:
        return ready.READY / ready.BASIS
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    write_basis(tiny_basis, path)
    return path


@pytest.fixture(scope="session")
def tiny_customer(tiny_base: Path, tiny_basis: Basis, tiny_basis_file: Path) -> Coefficients:
    """A customer of `tiny_base` whose coefficients are all non-zero and move the logits clearly."""
    if ready.READY:
        return read_coefficients(ready.READY / ready.CUSTOMER)
    return ready.make_customer(tiny_base, tiny_basis, tiny_basis_file)


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
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A merged bundle of the tiny customer."""
    if ready.READY:
        return ready.READY / ready.EXPORTED
    return ready.make_bundle(tiny_base, tiny_basis, tiny_customer, tmp_path_factory.mktemp("bundles") / "acme")


@pytest.fixture(scope="session")
def switchable(tiny_base: Path, tiny_basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A switchable bundle of the tiny base, with room for heads of six labels."""
    if ready.READY:
        return ready.READY / ready.SWITCHABLE
    return ready.make_bundle(tiny_base, tiny_basis, None, tmp_path_factory.mktemp("bundles") / "switchable")


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a fresh copy of the bundle."""

    def copy() -> Path:
        return Path(shutil.copytree(exported, tmp_path / "acme"))

    return copy
