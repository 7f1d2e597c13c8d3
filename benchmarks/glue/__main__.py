"""GLUE tasks x methods x seeds: QR-LoRA beside full fine-tuning, LoRA, PiSSA, VeRA, TinyLoRA and the head alone.

    python -m benchmarks.glue --model mpnet=MPNET_FOLDER --model minilm=MINILM_FOLDER --data GLUE_FOLDER \
        -o benchmarks/results/glue --work /tmp/glue --workers 16 --budget-seconds 540

Every method starts from the same warmed-up checkpoint (a quarter of the training rows, 3 epochs of
full fine-tuning, per task and seed), and again from the pretrained encoder with a fresh head. One
JSON line per finished run goes to OUTPUT/runs.jsonl; the same command, started again, does what is
missing. `--report-only` writes the table and the curves from the lines. `--set-aside runs_old.jsonl`
moves the lines of runs that would be made in another way now out of the record, so that they are done
again. `--data hub` reads GLUE from the Hugging Face hub. `--methods qr-all-half qr-all-quarter` adds rows of
QR-LoRA at other rates than its default.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.common.workers import named_model, run_workers
from benchmarks.glue.methods import COMPARED
from benchmarks.glue.records import check_settings, read_records, set_aside
from benchmarks.glue.report import plot_curves, render_table
from benchmarks.glue.runs import RECORDS, Choice, Place, make_plan, read_plan
from benchmarks.glue.starts import STARTS
from benchmarks.glue.tasks import ALL_TASKS, TASKS, write_tokens
from benchmarks.glue.work import Job, Settings, is_current, model_names, work
from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.training.settings import choose_device

MARGIN_S = 10.0
"""Of a time budget, kept for the report and the workers' end."""


def run(job: Job, data: str) -> None:
    """Start the workers, make the tokens that they wait for, and wait for them.

    Raises:
        InputError: the data or a model cannot be read; the workers are stopped.
    """
    job.place.make()
    check_settings(job.place.records, job.settings.record_again)
    run_workers(work, job, lambda: _make_tokens(job, data))


def _make_tokens(job: Job, data: str) -> None:
    for name in model_names(job.plan):
        checkpoint = open_checkpoint(job.models[name])
        for run_ in {run_.task: run_ for run_ in job.plan if run_.model == name}.values():
            path = job.place.tokens(run_)
            if not path.is_file():
                write_tokens(ALL_TASKS[run_.task], data, checkpoint, path, job.settings.max_length, job.settings.rows)


def report(output: Path) -> None:
    """Write table.md and the curves from the records, and print the table.

    Raises:
        InputError: there are no records.
    """
    records = read_records(output / RECORDS)
    if not records:
        raise InputError(f"{output / RECORDS} holds no runs")
    table = render_table(records)
    (output / "table.md").write_text(table, encoding="utf-8")
    plot_curves(records, output)
    print(table)


def _job(arguments: argparse.Namespace, began: float) -> Job:
    device = choose_device(arguments.device or "auto")
    models = dict(arguments.models)
    choice = Choice(
        tuple(models), tuple(arguments.tasks), tuple(arguments.starts), tuple(arguments.methods), tuple(arguments.seeds)
    )
    bf16 = device == "cuda" if arguments.bf16 is None else arguments.bf16
    settings = Settings(
        epochs=arguments.epochs,
        points=arguments.points,
        bf16=bf16,
        rows=arguments.rows,
        dropout=arguments.dropout,
        held_out=arguments.held_out,
        max_length=arguments.max_length,
    )
    return Job(
        plan=tuple(read_plan(arguments.plan) if arguments.plan else make_plan(choice)),
        place=Place(arguments.output, arguments.work),
        models=models,
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
    parser.add_argument("--data", help="folder with TASK/train.tsv and TASK/dev.tsv, or hub")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the records, table and curves")
    parser.add_argument("--work", type=Path, help="folder of what can be made again: tokens, warmed-up checkpoints")
    parser.add_argument("--workers", type=int, default=1, help="processes, spread over the GPUs")
    parser.add_argument("--budget-seconds", type=float, help="stop before this time is up")
    parser.add_argument("--tasks", nargs="+", choices=list(ALL_TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=COMPARED)
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-length", type=int, default=128, help="tokens a row")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--points", type=int, default=10, help="scores along a run")
    parser.add_argument("--rows", type=int, help="bound on the rows of each part, for a trial")
    parser.add_argument("--dropout", action=argparse.BooleanOptionalAction, default=True, help="as the model has it")
    parser.add_argument("--held-out", type=float, default=0.0, help="share of training rows to score, not dev rows")
    parser.add_argument("--plan", type=Path, help="file of keys MODEL/TASK/START/METHOD/SEED, in order")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--report-only", action="store_true", help="write table and curves from the records there are")
    parser.add_argument("--set-aside", help="file in OUTPUT for lines that were made in another way than now")
    parser.add_argument("--no-report", action="store_true", help="leave table and curves to a later --report-only")
    arguments = parser.parse_args()
    if not arguments.report_only and not (arguments.models and arguments.data and arguments.work):
        parser.error("--model, --data and --work are needed, or --report-only")
    return arguments


def main() -> int:
    """Parse, run, report."""
    began = time.time()
    arguments = _parse()
    try:
        if arguments.set_aside:
            moved = set_aside(arguments.output / RECORDS, arguments.output / arguments.set_aside, is_current)
            print(f"{moved} runs that would be made in another way now are in {arguments.set_aside}", file=sys.stderr)
        if not arguments.report_only:
            job = _job(arguments, began)
            run(job, arguments.data)
            left = len(job.plan) - len({r.key for r in job.plan} & job.done())
            print(f"{len(job.plan) - left} of {len(job.plan)} runs are done", file=sys.stderr)
        if not arguments.no_report:
            report(arguments.output)
    except QrloraError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
