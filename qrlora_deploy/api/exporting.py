"""From a base to forms of it that run without it."""

from pathlib import Path
from typing import Any

from qrlora_deploy.api.inputs import Progress, StrPath, as_basis, customer_with_basis
from qrlora_deploy.api.sources import as_checkpoint, base_of
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.choosing import check_customer, check_output, choose_options
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.exporting.registry import faults_named, find_exporter
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import Checkpoint


def export(
    base: StrPath | Checkpoint | None,
    basis: StrPath | Basis | None,
    output: StrPath,
    *,
    coefficients: StrPath | Coefficients | None = None,
    format: str = "onnx",
    text_column: str | None = None,
    label_column: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a form of a base that runs without it: by default a switchable ONNX bundle.

    A switchable bundle takes any customer of the basis in any row of a batch; with `coefficients` one customer is
    folded in. Ends with a check against PyTorch on real text; what fails it is not left.

    Args:
        base: folder or hub name; None where a coefficients file remembers one that is found.
        basis: a file or a `Basis`; None as for `base`.
        output: the new bundle's folder, which must not hold anything yet; of other formats a new file or folder.
        coefficients: the customer of a merged bundle, or of a format that holds one: a file or `Coefficients`.
        format: name of an exporter: "onnx", "onnx-adapter", "peft" or another package's.
        text_column: column of the text in data that an option names; common names are found.
        label_column: column of the label in it; "label" is found.
        progress: called with (description, done, total) after each step.
        **options: of the exporter, by the names and with the defaults of the command line's. Of ONNX bundles they are
            those of `exporters.onnx.OnnxOptions`: `precision`, `head_labels`, `data`, `provider` and others. Data may
            be a path, the name of a hub data set, or rows that were read before.

    Returns:
        What was written and how the check came out, plain JSON values.

    Raises:
        InputError: an argument is wrong, does not belong to the format, or the base cannot be exported.
        BasisMismatchError: base, basis and customer do not belong together.
        CheckFailed: the export's answers are not those of PyTorch.
        QrloraError: the disk or the memory is full.

    Examples:
        >>> record = qr.export("base", "basis.safetensors", "switchable")
        >>> record["kind"], record["parity"]["max_abs_error"] < 1e-3
        ('switchable', True)
    """
    place = Path(output)
    exporter = find_exporter(format)
    check_customer(exporter, coefficients is not None)
    chosen = choose_options(exporter, options, text_column, label_column)
    check_output(exporter, place)
    checkpoint, frozen, customer = _belonging(base, basis, coefficients)
    with faults_named(exporter.name):
        return dict(exporter.export(ExportJob(checkpoint, frozen, place, customer, progress), chosen))


def _belonging(
    base: StrPath | Checkpoint | None, basis: StrPath | Basis | None, coefficients: StrPath | Coefficients | None
) -> tuple[Checkpoint, Basis, Coefficients | None]:
    if coefficients is not None:
        frozen, customer = customer_with_basis(basis, coefficients)
        return base_of(base, coefficients), frozen, customer
    if base is None or basis is None:
        raise InputError("base and basis: give both; only a coefficients file remembers them")
    return as_checkpoint(base), as_basis(basis), None
