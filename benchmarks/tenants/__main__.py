"""One basis for many customers: chosen on five domains and banking77, judged on nine customers that it has not seen.

    python -m benchmarks.tenants --model minilm=MINILM_FOLDER --model mpnet=MPNET_FOLDER --data FOLDER \
        -o benchmarks/results/tenants --work /tmp/tenants --workers 16 --budget-seconds 290

FOLDER has `tenants/` with `clinc150/DOMAIN`, banking77, snips, atis, trec and ag_news, each with train.tsv and
test.tsv of the columns text and label. A split divides CLINC150's ten domains in halves: five and banking77 choose the
basis, the other five and the four others are the customers. All have one encoder, the pretrained one, and each a head
of its own, fitted to a quarter of its rows and frozen. One JSON line per finished run goes to OUTPUT/runs.jsonl; the
same command, started again, does what is missing. `--report-only` writes the table from the lines.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.common.workers import named_model, run_workers
from benchmarks.glue.records import check_settings, read_records
from benchmarks.tenants.customers import Split, write_customer
from benchmarks.tenants.methods import METHODS
from benchmarks.tenants.plan import ENCODER, Place, make_plan
from benchmarks.tenants.report import render
from benchmarks.tenants.work import Job, Settings, work
from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.training.settings import choose_device

MARGIN_S = 5.0
"""Of a time budget, kept for the report and the workers' end."""


def run(job: Job) -> None:
    """Start the workers, make the tokens that they wait for, and wait for them.

    Raises:
        InputError: the data or a model cannot be read; the workers are stopped.
    """
    job.place.make()
    check_settings(job.place.records, lambda _: job.settings.record)
    run_workers(work, job, lambda: _make_tokens(job))


def _make_tokens(job: Job) -> None:
    for each in {job.place.tokens(run): run for run in job.plan if run.customer != ENCODER}.values():
        path, checkpoint = job.place.tokens(each), open_checkpoint(job.models[each.model])
        if not path.is_file():
            write_customer(job.rows, Split(each.split), each.customer, checkpoint, path, job.settings.max_length)


def report(output: Path) -> None:
    """Write table.md from the records, and print it.

    Raises:
        InputError: there are no records.
    """
    place = Place(output, output)
    records = read_records(place.records)
    if not records:
        raise InputError(f"{place.records} holds no runs")
    table = render(records)
    (output / "table.md").write_text(table, encoding="utf-8")
    print(table)


def _job(arguments: argparse.Namespace, began: float) -> Job:
    device = choose_device(arguments.device or "auto")
    models = dict(arguments.models)
    settings = Settings(
        epochs=arguments.epochs,
        train_rows=arguments.train_rows,
        test_rows=arguments.test_rows,
        head_steps=arguments.head_steps,
        bf16=device == "cuda",
    )
    return Job(
        plan=tuple(make_plan(list(models), arguments.splits, arguments.methods)),
        place=Place(arguments.output, arguments.work),
        models=models,
        data=str(arguments.data / "tenants"),
        settings=settings,
        device=device,
        workers=arguments.workers,
        launch=f"{began:.3f}",
        deadline=began + arguments.budget_seconds - MARGIN_S if arguments.budget_seconds else None,
        parent=os.getpid(),
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", dest="models", type=named_model, action="append", default=[], help="NAME=FOLDER")
    parser.add_argument("--data", type=Path, help="folder with tenants/")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the records and the table")
    parser.add_argument("--work", type=Path, help="folder of what can be made again: tokens, heads, bases")
    parser.add_argument("--workers", type=int, default=1, help="processes, spread over the GPUs")
    parser.add_argument("--budget-seconds", type=float, help="stop before this time is up")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--train-rows", type=int, default=Settings.train_rows, help="most of a customer")
    parser.add_argument("--test-rows", type=int, default=Settings.test_rows, help="most of a customer")
    parser.add_argument("--head-steps", type=int, default=Settings.head_steps, help="that a customer's head is fitted")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--report-only", action="store_true", help="write the table from the records there are")
    arguments = parser.parse_args()
    if not arguments.report_only and not (arguments.models and arguments.data and arguments.work):
        parser.error("--model, --data and --work are needed, or --report-only")
    return arguments


def main() -> int:
    """Parse, run, report."""
    began = time.time()
    arguments = _parse()
    try:
        if not arguments.report_only:
            job = _job(arguments, began)
            run(job)
            left = len(job.plan) - len({each.key for each in job.plan} & job.done())
            print(f"{len(job.plan) - left} of {len(job.plan)} runs are done", file=sys.stderr)
        report(arguments.output)
    except QrloraError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
