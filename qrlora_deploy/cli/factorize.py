"""`qrlora-deploy factorize`."""

import sys
from pathlib import Path
from typing import Any

import click

from qrlora_deploy.cli.options import (
    column_options,
    common,
    device_option,
    output_option,
    refuse_idle,
    seed_option,
    split_targets,
)
from qrlora_deploy.cli.output import Output, Table, progress_bar, size_text
from qrlora_deploy.cli.ranges import COUNT, FiniteRange

COLUMNS = ("name", "rank", "energy", "condition")
SPREADS = ("even", "energy", "sensitivity")


@click.command("factorize")
@click.argument("base")
@output_option("Basis file to write.")
@click.option(
    "--target",
    "--targets",
    "targets",
    multiple=True,
    help="Layers: query,key,value (or q,k,v) of any family, other names, or a regular expression; repeatable.",
)
@click.option("--last-layers", type=COUNT, help="Only the last N blocks.")
@click.option("--tau", type=FiniteRange(0, 1, min_open=True), help="Share of the energy to keep, by default 0.5.")
@click.option("--rank", type=COUNT, help="A fixed rank instead of --tau.")
@click.option("--budget", type=COUNT, help="A number of directions of all layers together instead of --tau.")
@click.option(
    "--spread",
    type=click.Choice(SPREADS),
    help="How --budget is spread: the same rank in every layer (even, the default), where R has its energy, or where "
    "the loss of --data is most sensitive.",
)
@click.option("--whiten", is_flag=True, help="Weight the columns of each layer by its inputs on --data.")
@click.option(
    "--data",
    multiple=True,
    help="For --spread sensitivity and --whiten: text of a customer, TSV, CSV, JSONL, Parquet, or a data set name; "
    "repeatable. Sensitivity needs labels that the base's head knows.",
)
@column_options
@click.option("--batches", type=COUNT, default=24, show_default=True, help="Of 32 rows of --data, each file in turn.")
@click.option(
    "--max-length", type=COUNT, default=128, show_default=True, help="Tokens of a row of --data that are read."
)
@seed_option
@device_option()
@common
def command(
    base: str,
    output: Path,
    targets: tuple[str, ...],
    last_layers: int | None,
    tau: float | None,
    rank: int | None,
    budget: int | None,
    spread: str | None,
    whiten: bool,
    data: tuple[str, ...],
    device: str,
    **looking: Any,
) -> Output:
    """Factorize the weights of BASE, a folder or hub name, into a basis all customers share.

    Without --target every linear layer of every block is taken, but for those that a switchable bundle cannot have.

    \b
    Examples:
      qrlora-deploy factorize roberta-base -o basis.safetensors --target query --last-layers 4 --tau 0.5
      qrlora-deploy factorize roberta-base -o basis.safetensors --budget 3000 --spread even
      qrlora-deploy factorize base -o basis.safetensors --budget 700 --spread sensitivity --data a.tsv --data b.tsv
    """
    if sum(value is not None for value in (tau, rank, budget)) > 1:
        raise click.UsageError("--tau, --rank and --budget exclude each other; give one of them")
    if spread is not None and budget is None:
        raise click.UsageError("--spread needs --budget, the number of directions it spreads")
    refuse_idle(["batches", "max_length", "seed", "text_column", "label_column"], bool(data), "there is --data")
    patterns = split_targets(targets)
    from qrlora_deploy.api.factorizing import factorize
    from qrlora_deploy.formats.basis import FORMAT
    from qrlora_deploy.inspection.describe import basis_rows
    from qrlora_deploy.io.files import has_format
    from qrlora_deploy.io.outputs import check_replaceable
    from qrlora_deploy.io.temporary import temporary_folder
    from qrlora_deploy.models.checkpoint import open_checkpoint
    from qrlora_deploy.models.support import shared_layers
    from qrlora_deploy.models.targets import choose_targets, left_out

    check_replaceable(output, "basis", has_format(FORMAT))
    checkpoint = open_checkpoint(base)
    wanted: dict[str, Any] = {
        "targets": patterns,
        "last_layers": last_layers,
        "tau": tau,
        "rank": rank,
        "budget": budget,
        "spread": spread,
        "whiten": whiten,
        "data": data,
        "device": device,
        **looking,
    }
    # Beside the output, where there is room for a basis.
    with progress_bar() as progress, temporary_folder(output.absolute().parent, output.name) as scratch:
        basis = factorize(checkpoint, progress=progress, scratch=scratch, **wanted)
        basis.save(output)
    missed = [] if patterns else left_out(checkpoint.skeleton())
    chosen = choose_targets(checkpoint.skeleton(), patterns, last_layers)
    without = [name for name in chosen if name not in basis.ranks]
    shared = shared_layers(checkpoint.skeleton(), basis.names)
    if rank is not None and (below := [kept for kept in basis.ranks.values() if kept < rank]):
        lesser = f"{len(below)} of {len(basis.ranks)} layers have fewer directions than --rank {rank}"
        click.echo(f"Note: {lesser} and keep all of theirs, {min(below)} or more", err=True)
    if shared:
        print(f"Warning: {shared}; export a basis of them with --merge", file=sys.stderr)
    rows = basis_rows(basis)
    facts = {"digest": basis.digest, "coefficients": basis.total_rank, "size": size_text(output.stat().st_size)}
    record = {"output": output, "digest": basis.digest, "total_rank": basis.total_rank, "targets": rows}
    if without:
        record["without_directions"] = without
        facts["without directions"] = f"{len(without)} of {len(chosen)} layers"
    if missed:
        record["left_out"] = [{"names": part.names, "reason": part.reason} for part in missed]
        facts["left out"] = "; ".join(str(part) for part in missed)
    table = Table(COLUMNS, [[row[column] for column in COLUMNS] for row in rows])
    return Output(record, f"wrote {output}", facts, [table])
