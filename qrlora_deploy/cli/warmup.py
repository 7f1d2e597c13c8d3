"""`qrlora-deploy warmup`."""

from pathlib import Path
from typing import Any

import click

from qrlora_deploy.cli.options import common, output_option, training_options
from qrlora_deploy.cli.output import Output, progress_bar, show_remark


@click.command("warmup")
@click.argument("base")
@output_option("Folder to write: a checkpoint with a task head.")
@click.option(
    "--mode",
    type=click.Choice(["full", "head"]),
    default="full",
    show_default=True,
    help="Train all weights, or the head alone.",
)
@training_options(epochs=3, batch_size=32, rate="5e-5 for full, 1e-3 for head")
@common
def command(
    base: str,
    output: Path,
    data: str,
    evaluation: str | None,
    text_column: str | None,
    label_column: str | None,
    **settings: Any,
) -> Output:
    """Fine-tune BASE, a folder or hub name, before factorizing: gives an encoder its task head.

    \b
    Examples:
      qrlora-deploy warmup roberta-base --data all.tsv --eval dev.tsv -o base
    """
    from qrlora_deploy.data.examples import read_examples
    from qrlora_deploy.io.outputs import check_free_folder
    from qrlora_deploy.training.settings import WarmupSettings, choose_device

    check_free_folder(output)
    chosen = WarmupSettings(**{name: value for name, value in settings.items() if value is not None})
    columns = (text_column, label_column, None, chosen.labelled)
    train = read_examples(data, *columns)
    held_out = read_examples(evaluation, *columns) if evaluation else None
    choose_device(chosen.device)
    # Imported here: the seconds that PyTorch and transformers take are not waited for by who named a wrong file.
    from qrlora_deploy.models.checkpoint import open_checkpoint
    from qrlora_deploy.training.warmup import warmup

    checkpoint = open_checkpoint(base)
    with progress_bar() as progress:
        report = warmup(checkpoint, train, held_out, output, chosen, progress)
    show_remark(report)
    return Output(report, f"wrote {output}", report)
