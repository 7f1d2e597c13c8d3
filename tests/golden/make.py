"""Writes the golden files of today's format versions beside it: `python -m tests.golden.make` in the repository root.

Each was written once, by its own version, and stays as it is: a reader that cannot read it breaks every file in the
field. Write new ones, under new names, only for a new format version; those of older versions have no writer any more.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from qrlora_deploy.formats.basis import Basis, BasisTarget, write_basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.rank_rules.energy_share import EnergyShare

FOLDER = Path(__file__).parent
BASIS_FILE = FOLDER / "basis.safetensors"
"""Of version 1."""

BASIS_2_FILE = FOLDER / "basis_2.safetensors"
COEFFICIENTS_FILE = FOLDER / "coefficients.safetensors"
"""Of version 1, in which a customer without thresholds is still written."""

COEFFICIENTS_2_FILE = FOLDER / "coefficients_2.safetensors"


def golden_basis() -> Basis:
    """Two targets of ranks 2 and 1; every number is exact in fp32."""
    first = BasisTarget(
        name="encoder.layer.0.query",
        q=np.array([[1, 0], [0, 0.5], [0, -0.5], [0, 0.5], [0, 0.5]], np.float32),
        r=np.array([[4, 0.25, -1], [0, 2, 1.5]], np.float32),
        diagonal=np.array([4, 2, 0.125], np.float32),
        weight_digest="11" * 32,
    )
    second = BasisTarget(
        name="encoder.layer.1.query",
        q=np.array([[0.5], [0.5], [-0.5], [0.5]], np.float32),
        r=np.array([[0.25, -3]], np.float32),
        diagonal=np.array([3, 1], np.float32),
        weight_digest="22" * 32,
    )
    return Basis((first, second), "acme/bäse", EnergyShare(0.75), {"qrlora-deploy": "0.1.0"})


def golden_coefficients() -> Coefficients:
    """A customer of `golden_basis` with a head of two labels."""
    return Coefficients(
        values=np.array([0.5, -0.25, 8], np.float32),
        basis_digest=golden_basis().digest,
        base_name="acme/bäse",
        base_digest="33" * 32,
        task="text-classification",
        labels=("no", "yes, naïve"),
        head={
            "classifier.weight": np.array([[1, 2, 3], [-1, 0, 0.5]], np.float32),
            "classifier.bias": np.array([0.75, -0.75], np.float32),
        },
        basis_file="basis.safetensors",
        training={"seed": 7, "metrics": {"accuracy": 0.875}},
    )


def golden_thresholds() -> Coefficients:
    """The same for a multi-label task, with a threshold for each label."""
    return replace(golden_coefficients(), task="text-multi-label", thresholds=(0.25, 0.625))


if __name__ == "__main__":
    write_basis(golden_basis(), BASIS_2_FILE)
    write_coefficients(golden_coefficients(), COEFFICIENTS_FILE)
    write_coefficients(golden_thresholds(), COEFFICIENTS_2_FILE)
