"""`qrlora-deploy export`."""

from pathlib import Path

import click

from qrlora_deploy.cli.options import (
    basis_option,
    coefficients_option,
    column_options,
    common,
    output_option,
    provider_option,
)
from qrlora_deploy.cli.output import Output, plain, progress_bar


@click.command("export")
@click.argument("base", required=False)
@basis_option(required=False)
@coefficients_option(required=False)
@output_option("Folder to write, a bundle.")
@click.option("--merge", is_flag=True, help="One customer as plain weights.")
@click.option("--format", "format_name", default="onnx", show_default=True, help="Name of an exporter.")
@click.option("--data", help="Texts of the parity check, by default ones of this project.")
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
    data: str | None,
    text_column: str | None,
    label_column: str | None,
    provider: str,
) -> Output:
    """Write a bundle that runs without the base: BASE plus one customer, as ONNX.

    Ends with a check against PyTorch on real text; a bundle that fails it is not left.
    BASE and --basis may be left out where those that the coefficients file remembers are found.

    \b
    Example:
      qrlora-deploy export --merge --coefficients acme.safetensors -o acme-bundle
    """
    if not merge or coefficients is None:
        raise click.UsageError("this version exports merged bundles only: give --merge and --coefficients")
    from qrlora_deploy.coefficients import read_coefficients
    from qrlora_deploy.exporting import find_exporter
    from qrlora_deploy.files import check_free_folder
    from qrlora_deploy.locating import locate_base, locate_basis
    from qrlora_deploy.training.data import read_examples

    exporter = find_exporter(format_name)
    check_free_folder(output)
    customer = read_coefficients(coefficients)
    frozen = locate_basis(customer, coefficients, basis)
    checkpoint = locate_base(customer, coefficients, base)
    texts = read_examples(data, text_column, label_column) if data else None
    with progress_bar() as progress:
        manifest = exporter(checkpoint, frozen, customer, output, texts=texts, provider=provider, progress=progress)
    record = plain(manifest)
    names = ("kind", "task", "labels", "precision", "opset", "parity", "customer_effect")
    return Output(record, f"wrote {output}", {name: record[name] for name in names})
