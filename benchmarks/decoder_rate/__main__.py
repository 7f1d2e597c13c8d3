"""Does the default learning rate of decoders fit? Coefficients at several times it, and LoRA, over several seeds.

    python -m benchmarks.decoder_rate BASE --task SST-2=SST-2/train.tsv,SST-2/dev.tsv --bases /tmp/bases \\
        --out benchmarks/results/decoder_rate.json

BASE is a folder or hub name of a decoder. The first task is the customer banking that comes with the project, as
"Request: ...\\nIntent:" with the words of its label; others are files of prompts and completions, or GLUE's SST-2.
2 epochs of 600 rows in steps of 16; the score is that of the better epoch, by the likelihood of 300 held-out rows. The
file is written anew after each run, and what it holds already is not run again; `--minutes` bounds the time.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.common.measuring import environment
from benchmarks.decoder_rate.page import table
from benchmarks.decoder_rate.plan import ALPHA, FACTORS, RANK, SETUPS, Planned, planned
from benchmarks.decoder_rate.runs import BATCH_SIZE, EPOCHS
from benchmarks.decoder_rate.tasks import HELD_OUT_ROWS, TRAIN_ROWS, Task, banking, read_task
from benchmarks.decoder_rate.working import make_bases, run_here, start
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.training.settings import choose_device


def _results(arguments: argparse.Namespace, wanted: Sequence[Planned], tasks: Sequence[Task]) -> Iterator[Any]:
    """Each run's record as it ends, in processes that share the device."""
    ends = time.time() + 60 * arguments.minutes
    bases = make_bases(arguments.base, arguments.setups, arguments.bases, arguments.device)
    known = (arguments.base, tasks, bases, arguments.device)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, start, known) as pool:
        futures: list[Future[Any]] = [pool.submit(run_here, each, ends) for each in wanted]
        for future in as_completed(futures):
            if future.result() is not None:
                yield future.result()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or hub name of a decoder")
    parser.add_argument("--task", dest="tasks", type=read_task, action="append", default=[], help="NAME=TRAIN,DEV")
    parser.add_argument("--setups", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, help="of the default rate of classifiers")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no run begins")
    parser.add_argument("--quick", type=int, help="rows of each task instead of all, to see that it works")
    parser.add_argument("--bases", type=Path, required=True, help="folder of the bases' files")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    """Parse, measure, write and print."""
    arguments = _arguments()
    arguments.device = choose_device(arguments.device)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tasks = [banking(), *arguments.tasks]
    if arguments.quick:
        few = range(arguments.quick)
        tasks = [Task(task.name, task.train.take(few), task.held_out.take(few)) for task in tasks]
    checkpoint = open_checkpoint(arguments.base)
    what = {"base": checkpoint.name, "base_digest": checkpoint.digest, "epochs": EPOCHS, "batch_size": BATCH_SIZE}
    what |= {"train_rows": TRAIN_ROWS, "held_out_rows": HELD_OUT_ROWS, "lora": {"r": RANK, "lora_alpha": ALPHA}}
    runs: list[dict[str, Any]] = json.loads(arguments.out.read_text())["runs"] if arguments.out.is_file() else []
    everything = planned([task.name for task in tasks], arguments.setups, arguments.seeds, arguments.factors)
    wanted = [each for each in everything if not each.is_done(runs)]
    for found in _results(arguments, wanted, tasks):
        runs.append(found)
        print(json.dumps(found), flush=True)
        write_json(arguments.out, {"environment": environment(arguments.device), **what, "runs": runs})
    print(table(runs))


if __name__ == "__main__":
    main()
