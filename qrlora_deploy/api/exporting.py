"""From a base to forms of it that run without it."""

from pathlib import Path
from typing import Any

from qrlora_deploy.api.inputs import Progress, StrPath, as_basis, customer_with_basis
from qrlora_deploy.api.sources import as_checkpoint, as_examples, base_of
from qrlora_deploy.data.examples import Examples, read_texts
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.registry import FP32_ONLY, ExportJob, find_exporter
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.models.checkpoint import Checkpoint


def export(
    base: StrPath | Checkpoint | None,
    basis: StrPath | Basis | None,
    output: StrPath,
    *,
    coefficients: StrPath | Coefficients | None = None,
    format: str = "onnx",
    head_labels: int | None = None,
    precision: str = "fp32",
    calibration: StrPath | None = None,
    table_dtype: str = "fp32",
    padding_free: bool = False,
    data: StrPath | Examples | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
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
        head_labels: switchable: customers may have heads of their own with so many labels at most.
        precision: of weights and activations: "fp32", "fp16", "bf16" or "int8".
        calibration: int8: texts that scales of activations are found on; None: while the graph runs.
        table_dtype: switchable: of the coefficients on the device, "fp32" or "fp16".
        padding_free: linear layers compute on text alone, not on padding.
        data: texts of the check; with labels that are the model's, accuracy is measured too. None: ones of this
            project.
        text_column: column of the text in `data` and `calibration`; common names are found.
        label_column: column of the label in `data`; "label" is found.
        provider: execution provider of the check.
        progress: called with (description, done, total) after each step.

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
    if format in FP32_ONLY and (precision != "fp32" or table_dtype != "fp32" or padding_free):
        raise InputError(f"{format} writes fp32 and no graph: precision, table_dtype and padding_free belong to onnx")
    check_free_folder(place)
    checkpoint, frozen, customer = _belonging(base, basis, coefficients)
    job = ExportJob(
        checkpoint,
        frozen,
        place,
        coefficients=customer,
        head_labels=head_labels or 0,
        texts=None if data is None else as_examples(data, text_column, label_column),
        provider=provider,
        progress=progress,
        precision=precision,
        table_dtype=table_dtype,
        calibration=None if calibration is None else read_texts(Path(calibration), text_column),
        padding_free=padding_free,
    )
    return dict(exporter(job))


def _belonging(
    base: StrPath | Checkpoint | None, basis: StrPath | Basis | None, coefficients: StrPath | Coefficients | None
) -> tuple[Checkpoint, Basis, Coefficients | None]:
    if coefficients is not None:
        frozen, customer = customer_with_basis(basis, coefficients)
        return base_of(base, coefficients), frozen, customer
    if base is None or basis is None:
        raise InputError("base and basis: give both; only a coefficients file remembers them")
    return as_checkpoint(base), as_basis(basis), None
