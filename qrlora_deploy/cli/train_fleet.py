"""`qrlora-deploy train-fleet`."""

import os
import re
import time
from pathlib import Path
from typing import Any

import click

from qrlora_deploy.cli.options import (
    BY_COEFFICIENTS,
    basis_option,
    common,
    customer_options,
    output_option,
    refuse_idle_training,
    tell_if_interrupted,
    training_options,
)
from qrlora_deploy.cli.output import Output, Table, TimedLines
from qrlora_deploy.cli.ranges import COUNT
from qrlora_deploy.errors import InputError, QrloraError

SHOWN_FAILURES = 20
LAUNCHER = "TORCHELASTIC_RUN_ID"
"""Set by torchrun and accelerate, which end every worker as soon as one ends with an error."""


@click.command("train-fleet")
@click.argument("base")
@basis_option(required=True)
@output_option("Folder for one coefficients file a customer, and summary.jsonl.")
@click.option("--customer-column", help="Column of the customers' ids; without it --data is a folder of one file each.")
@customer_options(
    head="Keep the base's head, or train each customer's last projection too.",
    resume="Pass over customers whose file is there from the same data and settings.",
)
@click.option("--rows-per-step", type=COUNT, help="Rows of all customers in a step. Default: by device.")
@click.option("--shard", help="I/N: train the I-th of N parts, from 0; torchrun's RANK and WORLD_SIZE by default.")
@training_options(epochs=5, batch_size=32, rate=BY_COEFFICIENTS)
@common
def command(
    base: str,
    basis: Path,
    output: Path,
    resume: bool,
    data: str,
    evaluation: str | None,
    customer_column: str | None,
    text_column: str | None,
    label_column: str | None,
    rows_per_step: int | None,
    shard: str | None,
    **settings: Any,
) -> Output:
    """Train the coefficients of many customers on BASE in one process, each as `train` would alone.

    Files appear as customers are done; what is wrong with one customer's data stops no other.

    \b
    Examples:
      qrlora-deploy train-fleet base --basis basis.safetensors --data all.tsv --customer-column id -o customers
      torchrun --nproc-per-node 8 --no-python qrlora-deploy train-fleet base --basis basis.safetensors \\
        --data folder -o customers
    """
    from qrlora_deploy.formats.basis import read_basis
    from qrlora_deploy.models.checkpoint import open_checkpoint
    from qrlora_deploy.models.locating import recorded_place
    from qrlora_deploy.training.fleet.customers import FleetSource, Shard
    from qrlora_deploy.training.fleet.options import FleetOptions
    from qrlora_deploy.training.fleet.run import train_fleet
    from qrlora_deploy.training.settings import TrainSettings, choose_device

    refuse_idle_training(evaluation, settings["head"])
    index, count = parse_shard(shard)
    # What was not given is left to the library's defaults, its own for each method.
    chosen = TrainSettings(**{name: value for name, value in settings.items() if value is not None})
    choose_device(chosen.device)
    held_out = Path(evaluation) if evaluation else None
    source = FleetSource(Path(data), held_out, customer_column, text_column, label_column)
    place = recorded_place(basis, output / "customer")
    local = int(os.environ.get("LOCAL_RANK", 0)) if shard is None else 0
    options = FleetOptions(output, resume, rows_per_step, Shard(index, count), local, place, _tell)
    meter = Meter()
    tell_if_interrupted(lambda: _finished(output, meter.total))
    report = train_fleet(open_checkpoint(base), read_basis(basis), source, chosen, options, meter)
    failed = [line for line in report.lines if line.status == "failed"]
    facts = {
        "trained": report.count("trained"),
        "skipped": report.count("skipped"),
        "failed": len(failed),
        "customers a minute": report.customers_per_minute,
        "seconds": report.seconds,
    }
    if report.strangers:
        facts["customers with held-out rows alone"] = report.strangers
    rows = [[line.customer, line.reason] for line in failed[:SHOWN_FAILURES]]
    tables = [Table(["customer", "reason"], rows, "failed")] if rows else []
    record = facts | {"held-out rows alone": report.strangers, "output": output, "summary": report.summary}
    return Output(record, f"wrote {report.summary}", facts, tables, _failure(len(failed), report.summary))


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _finished(folder: Path, total: int) -> str:
    """What an interrupted run has kept; `total` customers are its own, 0 where nobody counted them yet."""
    count = sum(1 for _ in folder.glob("*.safetensors"))
    if not count:
        return f"no customer is in {folder} yet"
    some = f"{count} of {total} customers" if total > 1 else f"{count} customer{'s' * (count > 1)}"
    return f"{some} {'are' if count > 1 else 'is'} in {folder}: the same command trains the others by --resume"


def parse_shard(given: str | None) -> tuple[int, int]:
    """Index and count of a worker's part, from `--shard` or from the launcher's variables.

    Raises:
        InputError: it is not I/N, or a launcher with several workers would train one part many times.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if given is None:
        given = f"{rank}/{world}"
    elif world != "1":
        raise InputError(f"--shard {given}: leave it out under a launcher, whose {world} workers share the customers")
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", given)
    if match is None:
        raise InputError(f"--shard {given}: give I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


def _failure(count: int, summary: Path) -> QrloraError | None:
    """The error of the command where customers failed, which a launcher must not see."""
    if not count:
        return None
    text = f"{count} customer{'s' if count > 1 else ''} failed; {summary} says why"
    if LAUNCHER in os.environ:
        click.echo(f"Warning: {text}", err=True)
        return None
    return QrloraError(text)


class Meter:
    """Prints how many customers are done, and how many a minute, now and then on stderr."""

    def __init__(self) -> None:
        self.lines = TimedLines()
        self.before: int | None = None
        self.total = 0

    def __call__(self, done: int, failed: int, total: int) -> None:
        """So many customers of all are done or failed."""
        self.total = total
        if self.before is None:
            self.before = done  # skipped or refused: none of this run's time went into them
        rate = 60 * (done - self.before) / max(time.monotonic() - self.lines.start, 1e-9)
        line = f"{done} of {total} customers, {rate:.1f} a minute, {failed} failed"
        self.lines.show(line, last=done >= total)
