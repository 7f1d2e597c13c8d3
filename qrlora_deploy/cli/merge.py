"""`qrlora-deploy merge`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrlora_deploy.cli.options import basis_option, coefficients_option, common, output_option
from qrlora_deploy.cli.output import Output, plain, progress_bar

if TYPE_CHECKING:
    from qrlora_deploy.merging.checkpoints import MergeReport, UnmergeReport


@click.command("merge")
@click.argument("base", required=False)
@basis_option(required=False)
@coefficients_option()
@output_option("Folder to write.")
@click.option("--unmerge", "merged", metavar="MERGED", help="Take the customer out of this merged checkpoint.")
@common
def command(base: str | None, basis: Path | None, coefficients: Path, output: Path, merged: str | None) -> Output:
    """Fold a customer into BASE: a plain Hugging Face checkpoint. With --unmerge, take it out.

    BASE and --basis may be left out: the coefficients file names them, and they are looked for beside it and in
    the current folder; a BASE with the name of a hub repository, there too.
    --unmerge copies the base where it is found, and subtracts where it is not.

    \b
    Examples:
      qrlora-deploy merge base --basis basis.safetensors --coefficients acme.safetensors -o acme
      qrlora-deploy merge --unmerge acme --coefficients acme.safetensors -o base-again
    """
    from qrlora_deploy.api.merging import merge, unmerge

    with progress_bar() as progress:
        if merged is None:
            done = merge(base, basis, coefficients, output, progress=progress)
            return _output(done, output)
        undone = unmerge(merged, basis, coefficients, output, base=base, progress=progress)
        return _output(undone, output)


def _output(report: "MergeReport | UnmergeReport", output: Path) -> Output:
    facts = {name: value for name, value in plain(report).items() if name not in ("targets", "output")}
    return Output(report, f"wrote {output}", {"targets": len(report.targets)} | facts)
