"""The tiny base and what is made of it, in a folder: for environments that can serve and cannot make it.

python -m tests.ready FOLDER
QRLORA_READY=FOLDER pytest ...   # elsewhere, without PyTorch
"""

import os
import sys
from pathlib import Path

import numpy as np

from qrlora_deploy.formats.basis import Basis, read_basis, write_basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from tests.runtime.generation.written import write_everything
from tests.tiny import SENTENCES, save_base

TARGETS = ("query", "value")

BASE, BASIS, CUSTOMER, EXPORTED, SWITCHABLE = "base", "basis.safetensors", "acme.safetensors", "acme", "switchable"
DECODER = "decoder"
"""With `switchable` and `customers`, as `tests.runtime.generation.written` makes them."""

READY = Path(os.environ["QRLORA_READY"]) if "QRLORA_READY" in os.environ else None
"""The folder with everything made before; None: tests make what they need."""


def make_basis(base: Path) -> Basis:
    """The basis of the query and value projections at tau = 0.5."""
    from qrlora_deploy.factorization.from_checkpoint import factorize
    from qrlora_deploy.models.checkpoint import open_checkpoint
    from qrlora_deploy.models.targets import choose_targets
    from qrlora_deploy.rank_rules.energy_share import EnergyShare

    checkpoint = open_checkpoint(str(base))
    return factorize(checkpoint, choose_targets(checkpoint.skeleton(), TARGETS), EnergyShare(0.5))


def make_customer(base: Path, basis: Basis, basis_file: Path) -> Coefficients:
    """A customer whose coefficients are all non-zero and move the logits clearly."""
    from qrlora_deploy.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(base))
    random = np.random.default_rng(7)
    signs = random.choice([-1.0, 1.0], basis.total_rank)
    return Coefficients(
        values=(signs * random.uniform(0.5, 1.5, basis.total_rank)).astype(np.float32),
        basis_digest=basis.digest,
        base_name=str(base),
        base_digest=checkpoint.digest,
        task=checkpoint.task,
        labels=checkpoint.labels,
        basis_file=str(basis_file),
        training={"seed": 7},
    )


def make_bundle(base: Path, basis: Basis, customer: Coefficients | None, output: Path) -> Path:
    """A merged bundle of the customer; without one a switchable bundle with room for heads of six labels."""
    from exporters.onnx import export_merged, export_switchable
    from exporters.onnx.options import OnnxOptions
    from qrlora_deploy.data.examples import Examples
    from qrlora_deploy.exporting.job import ExportJob
    from qrlora_deploy.models.checkpoint import open_checkpoint

    texts = Examples(list(SENTENCES), None, ["travel"] * len(SENTENCES), "sentences")
    checkpoint = open_checkpoint(str(base))
    if customer is not None:
        export_merged(ExportJob(checkpoint, basis, output, customer), OnnxOptions(data=texts))
    else:
        export_switchable(ExportJob(checkpoint, basis, output), OnnxOptions(data=texts, head_labels=6))
    return output


def make_everything(folder: Path) -> None:
    """Everything, under the names above."""
    base = save_base(folder / BASE)
    write_basis(make_basis(base), folder / BASIS)
    basis = read_basis(folder / BASIS)
    customer = make_customer(base, basis, folder / BASIS)
    write_coefficients(customer, folder / CUSTOMER)
    make_bundle(base, basis, customer, folder / EXPORTED)
    make_bundle(base, basis, None, folder / SWITCHABLE)
    write_everything(folder / DECODER)


if __name__ == "__main__":
    make_everything(Path(sys.argv[1]).resolve())
