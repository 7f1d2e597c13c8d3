"""`qrlora-deploy train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrlora_deploy.cli.options import (
    BY_COEFFICIENTS,
    EXISTING_FILE,
    basis_option,
    common,
    customer_options,
    output_option,
    refuse_idle_training,
    tell_if_interrupted,
    training_options,
)
from qrlora_deploy.cli.output import Output, progress_bar, show_remark, size_text

if TYPE_CHECKING:
    from qrlora_deploy.training.settings import TrainSettings


@click.command("train")
@click.argument("base")
@basis_option(required=True)
@output_option("Coefficients file to write.")
@customer_options(
    head="Keep the base's head, or train the last projection too; then it travels in the file.",
    resume="Go on from where an interrupted run of the same command stopped.",
)
@click.option("--start", type=EXISTING_FILE, help="Coefficients file to go on from, such as one that `project` made.")
@click.option("--dropout", is_flag=True, help="Drop out in the base as its config says; each step then runs all of it.")
@click.option(
    "--trunk-cache",
    type=click.Choice(["auto", "device", "host", "disk", "off"]),
    default="auto",
    show_default=True,
    help="Where the hidden states below the first adapted layer are kept, which are then computed once.",
)
@click.option("--packing", is_flag=True, help="Put short prompts with answers into one row; each sees itself alone.")
@click.option(
    "--base-dtype",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="In which the frozen base computes; coefficients are fp32.",
)
@training_options(epochs=5, batch_size=32, rate=f"{BY_COEFFICIENTS}; three times that for causal-lm")
@common
def command(
    base: str,
    basis: Path,
    output: Path,
    resume: bool,
    start: Path | None,
    data: str,
    evaluation: str | None,
    text_column: str | None,
    label_column: str | None,
    **settings: Any,
) -> Output:
    """Train one customer's coefficients on BASE, a folder or hub name, with labelled text.

    \b
    Examples:
      qrlora-deploy train base --basis basis.safetensors --data acme.tsv --eval acme-dev.tsv -o acme.safetensors
    """
    from qrlora_deploy.data.examples import read_examples
    from qrlora_deploy.formats.basis import read_basis
    from qrlora_deploy.formats.coefficients import FORMAT, read_coefficients, write_coefficients
    from qrlora_deploy.io.files import has_format
    from qrlora_deploy.io.outputs import check_replaceable
    from qrlora_deploy.training.settings import TrainSettings, choose_device

    refuse_idle_training(evaluation, settings["head"])
    check_replaceable(output, "coefficients file", has_format(FORMAT))
    # What was not given is left to the library's defaults, its own for each method.
    chosen = TrainSettings(**{name: value for name, value in settings.items() if value is not None})
    columns = (text_column, label_column, None, chosen.labelled, chosen.written)
    examples = read_examples(data, *columns)
    held_out = read_examples(evaluation, *columns) if evaluation else None
    frozen = read_basis(basis)
    begin = None if start is None else read_coefficients(start)
    choose_device(chosen.device)
    # Imported here: the seconds that PyTorch and transformers take are not waited for by who named a wrong file.
    from qrlora_deploy.models.checkpoint import open_checkpoint
    from qrlora_deploy.models.locating import recorded_place
    from qrlora_deploy.training.checkpoints import run_folder
    from qrlora_deploy.training.trainer import train

    checkpoint = open_checkpoint(base)
    place = recorded_place(basis, output)
    with run_folder(output, resume) as folder, progress_bar() as progress:
        _warn_of_damage(folder)
        tell_if_interrupted(
            lambda: f"{folder} is kept: the same command goes on by --resume" if folder.exists() else ""
        )
        customer = train(checkpoint, frozen, examples, held_out, chosen, folder, resume, place, progress, begin)
        write_coefficients(customer, output)
    show_remark(customer.training)
    _say_ended_early(customer.training["epochs"], chosen)
    _warn_of_one_answer(customer.task, customer.training)
    size_bytes = output.stat().st_size
    record = {"output": output, "size_bytes": size_bytes, "digest": customer.digest, "training": customer.training}
    facts = {"digest": customer.digest, "coefficients": len(customer.values), "size": size_text(size_bytes)}
    return Output(record, f"wrote {output}", facts | customer.training)


def _warn_of_damage(folder: Path) -> None:
    """Say what of an interrupted run is not believed."""
    from qrlora_deploy.training.checkpoints import last_whole

    last, passed = last_whole(folder)
    start = f"it goes on from {last.name}" if last else "it starts from the beginning"
    for line in passed:
        click.echo(f"Warning: {line}; {start}", err=True)


def _say_ended_early(epochs: float, chosen: "TrainSettings") -> None:
    """Say so where `--patience` was out before `--epochs` were over."""
    if epochs < chosen.epochs:
        gain = f"no gain on --eval in {chosen.patience}" if chosen.patience > 1 else "no gain on --eval"
        click.echo(f"Note: ended after {epochs:g} of {chosen.epochs} epochs, {gain}; the best one is kept", err=True)


def _warn_of_one_answer(task_name: str, record: Mapping[str, Any]) -> None:
    """Say so where training may have ended in one answer for every text, as a learning rate that is too high does."""
    from qrlora_deploy.tasks.registry import task_named

    task = task_named(task_name)
    if task.says_nothing(record["metrics"]):
        half = f"{record['learning_rate'] / 2:.3g}"
        click.echo(
            f"Warning: {task.signal} is 0 on the held-out rows: the answers say nothing of the labels, as when "
            f"every text gets the same one. A lower rate may help, such as --learning-rate {half}",
            err=True,
        )
