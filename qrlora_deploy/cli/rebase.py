"""`qrlora-deploy rebase`."""

from pathlib import Path
from statistics import median

import click

from qrlora_deploy.cli.options import EXISTING_FILE, common, output_option, tell_if_interrupted
from qrlora_deploy.cli.output import Output, plain, progress_bar
from qrlora_deploy.cli.ranges import FiniteRange

SHOWN = 3
"""So many of the customers that were not written are named."""


@click.command("rebase")
@click.argument("customers", type=click.Path(exists=True, path_type=Path))
@click.option("--to", required=True, type=EXISTING_FILE, help="Basis that the customers go to.")
@click.option("--basis", type=EXISTING_FILE, help="Basis that they were trained on; by default each file remembers it.")
@click.option("--base", help="Base of the new basis, where it is another one than the customers'.")
@output_option("Folder for the new files, under the same names.")
@click.option(
    "--least-share",
    type=FiniteRange(0, 1),
    default=0.0,
    show_default=True,
    help="Do not write a customer of whose update the new basis holds less than this share.",
)
@common
def command(
    customers: Path, to: Path, basis: Path | None, base: str | None, output: Path, least_share: float
) -> Output:
    """Move CUSTOMERS, a folder or one file, to another basis, by least squares.

    Each update stays as close as the new basis allows, and the share says how close. With --base it is put on the
    weights of another base, as it is. The same command goes on where it was interrupted. Exit code 1 where a customer
    was not written.

    \b
    Examples:
      qrlora-deploy rebase customers --to wider.safetensors -o moved --least-share 0.9
    """
    from qrlora_deploy.api.projecting import rebase
    from qrlora_deploy.errors import CheckFailed

    tell_if_interrupted(lambda: f"{output} keeps the customers that are done: the same command goes on")
    with progress_bar() as progress:
        done = rebase(customers, to, output, basis=basis, base=base, least_share=least_share, progress=progress)
    refused = [one for one in done if one.refused]
    shares = [one.share for one in done if one.share is not None and not one.refused]
    facts = {"customers": f"{len(done) - len(refused)} of {len(done)}"}
    if shares:
        facts |= {"least share": f"{min(shares):.3f}", "median share": f"{median(shares):.3f}"}
    record = {"output": output, "customers": [plain(one) for one in done]}
    if not refused:
        return Output(record, f"wrote {len(done)} customers to {output}", facts)
    named = "; ".join(f"{one.customer}: {one.refused}" for one in refused[:SHOWN])
    more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    line = f"{len(refused)} of {len(done)} customers were not written: {named}{more}"
    return Output(record, f"wrote {len(done) - len(refused)} customers to {output}", facts, failure=CheckFailed(line))
