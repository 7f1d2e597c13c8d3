"""`qrlora-deploy doctor`."""

from pathlib import Path

import click

from qrlora_deploy.cli.options import ANY_PATH, EXISTING_FILE, common
from qrlora_deploy.cli.output import Output, Table, progress_bar, size_text
from qrlora_deploy.cli.ranges import COUNT
from qrlora_deploy.errors import CheckFailed


@click.command("doctor")
@click.option("--plan", "base", type=ANY_PATH, help="Say what customers of this base, a folder, would take, instead.")
@click.option("--customers", type=COUNT, help="With --plan: how many.")
@click.option("--gpu", help="With --plan: rows a second on this device, such as H100 or cpu; by default on all known.")
@click.option("--basis", type=EXISTING_FILE, help="With --plan: the basis; without it one of all layers is estimated.")
@click.option("--rank", type=COUNT, help="With --plan, without --basis: a fixed rank instead of tau 0.5.")
@click.option("--labels", type=COUNT, help="With --plan: labels of customers' own output layers, where they have some.")
@common
def command(
    base: Path | None,
    customers: int | None,
    gpu: str | None,
    basis: Path | None,
    rank: int | None,
    labels: int | None,
) -> Output:
    """Versions, GPU, execution providers that really load, and what to do about those that do not.

    With --plan: memory, files and rows a second of a fleet of customers, from the headers of the base's files and from
    figures that were measured; nothing is loaded.

    \b
    Examples:
      qrlora-deploy doctor --json
      qrlora-deploy doctor --plan base --customers 100000 --gpu H100
    """
    options = {"--customers": customers, "--gpu": gpu, "--basis": basis, "--rank": rank, "--labels": labels}
    if base is not None:
        if customers is None:
            raise click.UsageError("--plan needs --customers, how many there will be")
        if basis is not None and rank is not None:
            raise click.UsageError("--basis and --rank exclude each other: a basis has its ranks")
        return _plan(base, customers, gpu, basis, rank, labels or 0)
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise click.UsageError(f"{', '.join(given)} belongs to --plan BASE, which is missing")
    return _examine()


def _plan(base: Path, customers: int, gpu: str | None, basis: Path | None, rank: int | None, labels: int) -> Output:
    from qrlora_deploy.inspection.planning import make_plan

    plan = make_plan(base, customers, gpu=gpu, basis=basis, rank=rank, labels=labels)
    sizes = [[size.name, size.where, *map(size_text, size.size_bytes.values()), size.how] for size in plan.sizes]
    sizes.append(["together", "memory", *map(size_text, plan.memory_bytes.values()), "without activations"])
    speeds = [
        [
            speed.measured.device,
            speed.measured.precision + (", CUDA graph" if speed.measured.cuda_graph else ""),
            f"{speed.measured.batch} x {speed.measured.length}",
            round(speed.measured.rows_per_s),
            f"{speed.measured.model}, {speed.measured.date}",
            round(speed.rows_per_s),
        ]
        for speed in plan.speeds
    ]
    facts = {
        "layers": plan.layers,
        "coefficients of a customer": plan.coefficients,
        "basis": plan.basis_from,
    }
    tables = [Table(["what", "where", "fp32", "fp16", "from"], sizes)]
    if speeds:
        columns = ["device", "precision", "rows x tokens", "rows/s measured", "on", "rows/s estimated"]
        tables.append(Table(columns, speeds, "every row another customer; estimated for this base by its weights"))
    if plan.note:
        facts["rows a second"] = plan.note
    record = {"memory_bytes": plan.memory_bytes, "plan": plan}
    return Output(record, f"{customers} customers of {base}", facts, tables)


def _examine() -> Output:
    from qrlora_deploy.inspection.doctor import examine

    with progress_bar() as progress:
        health = examine(progress)
    rows = [[item.name, item.works, item.detail, item.advice] for item in health.findings]
    failure = None if health.usable else CheckFailed("no execution provider runs a model here, not even the CPU's")
    return Output(health, tables=[Table(["what", "works", "found", "what to do"], rows)], failure=failure)
