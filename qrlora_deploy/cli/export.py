"""`qrlora-deploy export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrlora_deploy.cli.options import (
    COUNT,
    basis_option,
    coefficients_option,
    column_options,
    common,
    output_option,
    provider_option,
)
from qrlora_deploy.cli.output import Output, progress_bar

if TYPE_CHECKING:
    from qrlora_deploy.formats.basis import Basis
    from qrlora_deploy.formats.coefficients import Coefficients
    from qrlora_deploy.models.checkpoint import Checkpoint

SHOWN = ("kind", "task", "labels", "precision", "calibration", "opset", "head_labels", "parity", "customer_effect")
"""What of an exporter's answer is shown without `--json`."""


@click.command("export")
@click.argument("base", required=False)
@basis_option(required=False)
@coefficients_option(required=False)
@output_option("Folder to write, a bundle.")
@click.option("--merge", is_flag=True, help="One customer as plain weights; needs --coefficients.")
@click.option("--format", "format_name", default="onnx", show_default=True, help="Name of an exporter.")
@click.option(
    "--head-labels",
    type=COUNT,
    help="Switchable: customers may have a head of their own, with at most this many labels.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of weights and activations; inputs and logits stay as they are. bf16 needs --provider cuda; "
    "int8 is for the CPU, and customers of a switchable bundle stay in fp32.",
)
@click.option(
    "--calibration",
    metavar="DATA",
    help="int8: texts like those that will be served, labelled or not; scales of activations are found on up to 128 "
    "of them, and an answer no longer depends on its batch. By default they are found while the graph runs, which "
    "keeps a little more of a customer's effect.",
)
@click.option(
    "--table-dtype",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="Switchable: of the customers' coefficients on the device. fp16 takes half the memory; files stay fp32.",
)
@click.option(
    "--padding-free",
    is_flag=True,
    help="The linear layers of an encoder compute on text alone, not on padding; for batches of uneven lengths. The "
    "graph gets one more input, token_index, which this project's sessions fill in.",
)
@click.option(
    "--data",
    help="Texts of the parity check, by default ones of this project. Where its labels are the model's, accuracy is "
    "measured too, on up to 512 rows, in PyTorch in fp32 and in the export; switchable: the base's. Where none of "
    "them is the model's, or for switchable not all, only the texts are used.",
)
@column_options
@provider_option
@common
def command(
    base: str | None,
    basis: Path | None,
    coefficients: Path | None,
    output: Path,
    merge: bool,
    format_name: str,
    head_labels: int | None,
    precision: str,
    calibration: str | None,
    table_dtype: str,
    padding_free: bool,
    data: str | None,
    text_column: str | None,
    label_column: str | None,
    provider: str,
) -> Output:
    """Write a form of BASE that runs without it: by default an ONNX bundle, switchable or merged.

    A switchable bundle takes any customer of the basis in any row of a batch, from coefficients
    files; with --merge one customer is folded in. Ends with a check against PyTorch on real text;
    what fails it is not left. BASE and --basis may be left out with --coefficients: the file names
    them, and they are looked for beside it and in the current folder; a BASE with the name of a hub
    repository, there too.

    \b
    Examples:
      qrlora-deploy export base --basis basis.safetensors -o bundle
      qrlora-deploy export base --basis basis.safetensors --precision fp16 -o bundle-fp16
      qrlora-deploy export base --basis basis.safetensors --precision int8 --calibration texts.tsv -o bundle-int8
      qrlora-deploy export --merge --coefficients acme.safetensors -o acme-bundle
    """
    if format_name == "onnx" and merge != (coefficients is not None):
        raise click.UsageError(
            "give --merge and --coefficients for a merged bundle, or neither of them for a switchable one"
        )
    from qrlora_deploy.data.examples import read_examples, read_texts
    from qrlora_deploy.exporting.registry import FP32_ONLY, ExportJob, find_exporter
    from qrlora_deploy.io.outputs import check_free_folder

    if precision != "fp32" and format_name in FP32_ONLY:
        raise click.UsageError(f"--precision belongs to --format onnx; what {format_name} writes is fp32")
    if table_dtype != "fp32" and format_name in FP32_ONLY:
        raise click.UsageError(f"--table-dtype belongs to --format onnx; what {format_name} writes is fp32")
    if calibration is not None and precision != "int8":
        raise click.UsageError(f"--calibration belongs to --precision int8; {precision} has no scales to find")
    if padding_free and format_name in FP32_ONLY:
        raise click.UsageError(f"--padding-free belongs to --format onnx; {format_name} writes no graph")
    exporter = find_exporter(format_name)
    check_free_folder(output)
    checkpoint, frozen, customer = _open(base, basis, coefficients)
    texts = read_examples(data, text_column, label_column) if data else None
    unlabelled = read_texts(calibration, text_column) if calibration else None
    with progress_bar() as progress:
        job = ExportJob(
            checkpoint,
            frozen,
            output,
            customer,
            head_labels or 0,
            texts,
            provider,
            progress,
            precision,
            table_dtype,
            unlabelled,
            padding_free,
        )
        record = dict(exporter(job))
    return Output(record, f"wrote {output}", _shown(record))


def _shown(record: "dict[str, Any]") -> "dict[str, Any]":
    """What is shown of an exporter's answer: no calibration where there is none, and of parity what was measured."""
    shown = {name: record[name] for name in record if name in SHOWN}
    if shown.get("calibration") is None:
        shown.pop("calibration", None)
    if isinstance(shown.get("parity"), dict):
        shown["parity"] = {name: value for name, value in shown["parity"].items() if value not in (None, [], ())}
    return shown


def _open(
    base: str | None, basis: Path | None, coefficients: Path | None
) -> "tuple[Checkpoint, Basis, Coefficients | None]":
    from qrlora_deploy.formats.basis import read_basis
    from qrlora_deploy.formats.coefficients import read_coefficients
    from qrlora_deploy.models.checkpoint import open_checkpoint
    from qrlora_deploy.models.locating import locate_base, locate_basis

    if coefficients is not None:
        customer = read_coefficients(coefficients)
        frozen = locate_basis(customer, coefficients, basis)
        return locate_base(customer, coefficients, base), frozen, customer
    if base is None or basis is None:
        raise click.UsageError("give BASE and --basis; only a coefficients file remembers them")
    return open_checkpoint(base), read_basis(basis), None
