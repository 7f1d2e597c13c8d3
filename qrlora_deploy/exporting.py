"""Exporters are found by name in an entry-point group, so that another package can add one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrlora_deploy.errors import InputError

if TYPE_CHECKING:
    from qrlora_deploy.basis import Basis
    from qrlora_deploy.checkpoint import Checkpoint
    from qrlora_deploy.coefficients import Coefficients
    from qrlora_deploy.training.data import Examples, TextRows

GROUP = "qrlora_deploy.exporters"

BUILT_IN = (
    EntryPoint("onnx", "exporters.onnx:export_bundle", GROUP),
    EntryPoint("onnx-adapter", "exporters.onnx_adapter:export_adapter", GROUP),
    EntryPoint("peft", "exporters.peft:export_peft", GROUP),
)
"""Also registered by pyproject.toml; named here so that a checkout works without being installed."""

FP32_ONLY = frozenset({"onnx-adapter", "peft"})
"""Exporters of coefficients, which are fp32 beside a graph of any precision."""


@dataclass(frozen=True)
class ExportJob:
    """What an exporter is asked for.

    Attributes:
        checkpoint: the base.
        basis: of that base.
        output: a new file or folder.
        coefficients: the customer, or None for a form that serves all customers.
        head_labels: most labels that a customer's own head may have, in a form for all customers.
        texts: texts of the check that ends the export; None: what comes with the project.
        provider: execution provider of that check.
        precision: of weights and activations, such as "fp32".
        table_dtype: of the coefficient table in a form for all customers, "fp32" or "fp16".
        calibration: texts that int8 finds the scales of its activations on; None: while the graph runs.
        padding_free: the ONNX graph computes on the tokens that take part, given by one more input.
        progress: called with a description, the steps done and all steps.
    """

    checkpoint: "Checkpoint"
    basis: "Basis"
    output: Path
    coefficients: "Coefficients | None" = None
    head_labels: int = 0
    texts: "Examples | None" = None
    provider: str = "cpu"
    progress: Callable[[str, int, int], None] | None = None
    precision: str = "fp32"
    table_dtype: str = "fp32"
    calibration: "TextRows | None" = None
    padding_free: bool = False


Exporter = Callable[[ExportJob], Mapping[str, Any]]
"""Writes `output` whole or not at all, and returns plain JSON values that say what was written."""


def find_exporter(name: str) -> Exporter:
    """The exporter registered under `name`.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    found = {point.name: point for point in (*BUILT_IN, *entry_points(group=GROUP))}
    if name not in found:
        raise InputError(f"--format {name}: no such exporter; there are {', '.join(sorted(found))}")
    exporter: Exporter = found[name].load()
    return exporter
