"""`qrlora-deploy pack`."""

from pathlib import Path

import click

from qrlora_deploy.cli.options import FOLDER, common, output_option
from qrlora_deploy.cli.output import Output, progress_bar, size_text
from qrlora_deploy.errors import InputError


@click.command("pack")
@click.argument("customers", type=FOLDER, metavar="FOLDER")
@click.option("--bundle", required=True, type=FOLDER, help="The switchable bundle that serves the customers.")
@output_option("Packed file to write, outside FOLDER.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16"]),
    help="Of the coefficients in the file; by default that of the bundle's table, to which they are rounded anyway.",
)
@common
def command(customers: Path, bundle: Path, output: Path, dtype: str | None) -> Output:
    """Put all customers of FOLDER, files <id>.safetensors, into one file that a serving process loads at once.

    Every customer is checked against the bundle. Customers with a head of their own are refused:
    leave them files of their own.

    \b
    Examples:
      qrlora-deploy pack customers/ --bundle bundle -o customers.packed.safetensors
    """
    from qrlora_deploy.io.files import has_format
    from qrlora_deploy.io.outputs import check_replaceable
    from qrlora_deploy.runtime import open_bundle
    from qrlora_deploy.runtime.customers.packed_header import FORMAT
    from qrlora_deploy.runtime.customers.packed_writer import write_packed

    check_replaceable(output, "packed file", has_format(FORMAT))
    if output.resolve().parent == customers.resolve():
        raise InputError(f"{output} lies among the customers; write it to another folder")
    manifest = open_bundle(bundle).manifest
    if manifest.kind == "merged":
        raise InputError(f"{bundle} is a merged bundle; only a switchable one serves many customers")
    with progress_bar() as progress:
        count = write_packed(customers, output, manifest, progress, dtype)
    size_bytes = output.stat().st_size
    record = {
        "output": output,
        "size_bytes": size_bytes,
        "customers": count,
        "coefficients": manifest.total_rank,
        "dtype": dtype or manifest.table_dtype,
        "basis_digest": manifest.basis_digest,
        "base_digest": manifest.base_digest,
    }
    each = f"{manifest.total_rank} in {record['dtype']}"
    facts = {"customers": count, "coefficients each": each, "size": size_text(size_bytes)}
    return Output(record, f"wrote {output}", facts)
