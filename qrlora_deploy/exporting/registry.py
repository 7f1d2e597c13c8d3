"""Exporters are found by name in an entry-point group, so that another package can add one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrlora_deploy.errors import InputError, library_errors

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples, TextRows
    from qrlora_deploy.formats.basis import Basis
    from qrlora_deploy.formats.coefficients import Coefficients
    from qrlora_deploy.models.checkpoint import Checkpoint

GROUP = "qrlora_deploy.exporters"
OWN_PACKAGE = "qrlora-deploy"

BUILT_IN = (
    EntryPoint("onnx", "exporters.onnx:export_bundle", GROUP),
    EntryPoint("onnx-adapter", "exporters.onnx_adapter:export_adapter", GROUP),
    EntryPoint("peft", "exporters.peft:export_peft", GROUP),
)
"""Also registered by pyproject.toml; named here so that a checkout works without being installed."""

MAX_HEAD_LABELS = 2**20
"""A customer with more labels has another task; each label takes a row of the output layer in every row of a table."""

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

    def __post_init__(self) -> None:
        """Refuse a table that no memory holds.

        Raises:
            InputError: naming the option.
        """
        if not 0 <= self.head_labels <= MAX_HEAD_LABELS:
            raise InputError(f"--head-labels must be between 0 and {MAX_HEAD_LABELS}, not {self.head_labels}")


Exporter = Callable[[ExportJob], Mapping[str, Any]]
"""Writes `output` whole or not at all, and returns plain JSON values that say what was written."""


def find_exporter(name: str) -> Exporter:
    """The exporter registered under `name`.

    Raises:
        InputError: there is none, and the message lists those there are; two packages register the
            name, which are both named; or another package's exporter cannot be loaded.
    """
    registered = (*BUILT_IN, *entry_points(group=GROUP))
    # What this package registers itself is BUILT_IN once more.
    found = {point.value: point for point in reversed(registered) if point.name == name}
    if not found:
        names = sorted({point.name for point in registered})
        raise InputError(f"--format {name}: no such exporter; there are {', '.join(names)}")
    if len(found) > 1:
        owners = sorted({f"{_package(point)} ({point.value})" for point in found.values()})
        raise InputError(f"--format {name} is registered more than once, by {' and '.join(owners)}; remove one of them")
    (point,) = found.values()
    if point in BUILT_IN:
        exporter: Exporter = point.load()
        return exporter
    with library_errors(f"--format {name}: the exporter of {_package(point)} cannot be loaded", InputError):
        exporter = point.load()
    if not callable(exporter):
        raise InputError(f"--format {name}: what {_package(point)} registers ({point.value}) is no exporter")
    return exporter


def _package(point: EntryPoint) -> str:
    """The package that registers an entry point."""
    return point.dist.name if point.dist is not None else OWN_PACKAGE
