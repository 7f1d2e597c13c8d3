"""`qrlora-deploy doctor`."""

import click

from qrlora_deploy.cli.options import common
from qrlora_deploy.cli.output import Output, Table, progress_bar
from qrlora_deploy.errors import CheckFailed


@click.command("doctor")
@common
def command() -> Output:
    """Versions, GPU, execution providers that really load, and what to do about those that do not.

    \b
    Examples:
      qrlora-deploy doctor --json
    """
    from qrlora_deploy.inspection.doctor import examine

    with progress_bar() as progress:
        health = examine(progress)
    rows = [[item.name, item.works, item.detail, item.advice] for item in health.findings]
    failure = None if health.usable else CheckFailed("no execution provider runs a model here, not even the CPU's")
    return Output(health, tables=[Table(["what", "works", "found", "what to do"], rows)], failure=failure)
