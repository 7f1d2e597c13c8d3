"""`qrlora-deploy export`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qrlora_deploy.cli.exporter_options import DEFAULT, FORMAT, ExportCommand
from qrlora_deploy.cli.options import basis_option, coefficients_option, column_options, common, output_option
from qrlora_deploy.cli.output import Output, progress_bar

if TYPE_CHECKING:
    from qrlora_deploy.formats.basis import Basis
    from qrlora_deploy.formats.coefficients import Coefficients
    from qrlora_deploy.models.checkpoint import Checkpoint


@click.command("export", cls=ExportCommand)
@click.argument("base", required=False)
@basis_option(required=False)
@coefficients_option(required=False)
@output_option("File or folder to write; of an ONNX bundle a folder.")
@click.option("--merge", is_flag=True, help="One customer as plain weights; needs --coefficients.")
@click.option(FORMAT, default=DEFAULT, show_default=True, help="Name of an exporter.")
@column_options
@common
def command(
    base: str | None,
    basis: Path | None,
    coefficients: Path | None,
    output: Path,
    merge: bool,
    format: str,
    text_column: str | None,
    label_column: str | None,
    **options: Any,
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
    from qrlora_deploy.exporting.choosing import check_customer, check_output, choose_options
    from qrlora_deploy.exporting.job import ExportJob
    from qrlora_deploy.exporting.registry import faults_named, find_exporter

    exporter = find_exporter(format)
    has_customer = coefficients is not None
    if merge and exporter.needs_customer is not None:
        raise click.UsageError(f"--merge belongs to {FORMAT} {DEFAULT}; leave it out with {FORMAT} {format}")
    check_customer(exporter, has_customer)
    if (merge and not has_customer) or (exporter.needs_customer is None and merge != has_customer):
        raise click.UsageError(
            "give --merge and --coefficients for a merged bundle, or neither of them for a switchable one"
        )
    source = click.get_current_context().get_parameter_source
    given = {name: value for name, value in options.items() if source(name) is ParameterSource.COMMANDLINE}
    chosen = choose_options(exporter, given, text_column, label_column)
    check_output(exporter, output)
    checkpoint, frozen, customer = _open(base, basis, coefficients)
    with progress_bar() as progress, faults_named(format):
        job = ExportJob(checkpoint, frozen, output, customer, progress)
        record = dict(exporter.export(job, chosen))
    return Output(record, f"wrote {output}", _shown(record, exporter.shown))


def _shown(record: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What is shown of an exporter's answer, without what there is none of: nothing calibrated, nothing measured."""
    shown = {name: record[name] for name in record if name in names and record[name] is not None}
    return {name: _present(value) if isinstance(value, dict) else value for name, value in shown.items()}


def _present(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value not in (None, [], ())}


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
