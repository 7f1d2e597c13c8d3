"""`qrlora-deploy inspect`."""

from pathlib import Path

import click

from qrlora_deploy.cli.options import ANY_PATH, basis_option, common
from qrlora_deploy.cli.output import Output, Table, size_text
from qrlora_deploy.errors import InputError
from qrlora_deploy.installation.parts import need


@click.command("inspect")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@basis_option(required=False)
@click.option("--plot", "output", type=ANY_PATH, help="Also draw it: a .png, .svg or .pdf to write.")
@common
def command(path: Path, basis: Path | None, output: Path | None) -> Output:
    """What PATH is and what it holds: a basis, a coefficients file, a bundle or a checkpoint.

    \b
    Examples:
      qrlora-deploy inspect basis.safetensors --plot energies.png
    """
    from qrlora_deploy.inspection.describe import describe
    from qrlora_deploy.io.outputs import check_free_file

    if output is not None:
        need("bench", "`inspect --plot`", ["matplotlib"])
        check_free_file(output)
    found = describe(path, basis)
    if basis is not None and found.coefficients is None:
        raise InputError(f"--basis belongs to a coefficients file, and {path} is a {found.kind}; leave it out")
    if output is not None:
        from qrlora_deploy.inspection.plots import plot_basis, plot_coefficients

        if found.coefficients is not None:
            plot_coefficients(found.coefficients, found.basis, output)
        elif found.basis is not None:
            plot_basis(found.basis, output)
        else:
            raise InputError(f"--plot draws a basis or a coefficients file, and {path} is a {found.kind}")
    facts = {"size": size_text(found.size_bytes)} | dict(found.facts)
    tables = [Table(list(found.targets[0]), [list(row.values()) for row in found.targets])] if found.targets else []
    record = {"kind": found.kind, "path": path, "size_bytes": found.size_bytes, **found.facts, "targets": found.targets}
    return Output(record, f"{path}: {found.kind}", facts, tables)
