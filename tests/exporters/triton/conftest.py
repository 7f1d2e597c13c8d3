"""A repository of the tiny base, and customers of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporters.triton.options import TritonOptions
from exporters.triton.repository import export_repository
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from tests.exporters.triton.fake_backend import MOST_ROWS


@pytest.fixture(scope="session")
def customers(tiny_customer: Coefficients) -> dict[str, Coefficients]:
    """acme as it is, beta with other numbers, gamma with a head of two labels and delta with one of six."""

    def own_head(labels: tuple[str, ...]) -> Coefficients:
        random = np.random.default_rng(len(labels))
        head = {
            "classifier.weight": random.normal(size=(len(labels), 32)).astype(np.float32),
            "classifier.bias": random.normal(size=len(labels)).astype(np.float32),
        }
        return replace(tiny_customer, labels=labels, head=head)

    return {
        "acme": tiny_customer,
        "beta": replace(tiny_customer, values=tiny_customer.values * np.float32(-0.5)),
        "gamma": own_head(("no", "yes")),
        "delta": own_head(("a", "b", "c", "d", "e", "f")),
    }


@pytest.fixture(scope="session")
def folder(customers: dict[str, Coefficients], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The customers' files."""
    folder = tmp_path_factory.mktemp("customers")
    for name, customer in customers.items():
        write_coefficients(customer, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def repository(
    tiny_base: Path, tiny_basis: Basis, texts: Examples, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Models `intents` and `intents_graph`, with room for heads of six labels."""
    output = tmp_path_factory.mktemp("triton") / "models"
    options = TritonOptions(name="intents", customers=str(folder), max_batch=MOST_ROWS, head_labels=6, data=texts)
    export_repository(ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, output), options)
    return output
