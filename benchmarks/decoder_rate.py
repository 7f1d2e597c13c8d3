"""Does the default learning rate of decoders fit? Coefficients of a causal LM at several times it, over several seeds.

    python -m benchmarks.decoder_rate BASE --task SST-2=sst2-train.jsonl,sst2-dev.jsonl \\
        --out benchmarks/results/decoder_rate.json

BASE is a folder or hub name of a decoder. The first task is the customer banking that comes with the project, as
"Request: ...\\nIntent:" with the words of its label; others are files of prompts and completions. Coefficients alone,
2 epochs of 600 rows; the score is that of the better epoch, by the likelihood of 150 held-out rows. The file is written
anew after each run, and what it holds already is not run again.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measuring import environment
from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.data.sample import held_out_examples, train_examples
from qrlora_deploy.data.turns import COMPLETION, PROMPT, Turn
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.training.settings import TrainSettings, default_rate
from qrlora_deploy.training.trainer import train

EPOCHS, BATCH_SIZE, LENGTH = 2, 16, 96
TRAIN_ROWS, HELD_OUT_ROWS = 600, 150
FACTORS = (1.0, 3.0, 6.0, 10.0)
"""Of the default rate of classifiers; that of decoders is 3 times it."""

SETUPS: dict[str, list[str]] = {"query and value": ["query", "value"], "all linear layers": []}


@dataclass(frozen=True)
class Task:
    """Prompts with completions."""

    name: str
    train: Examples
    held_out: Examples


def banking() -> Task:
    """The quickstart's first customer, whose labels are written out."""
    return Task(
        "banking",
        _drawn(_written(train_examples("banking")), TRAIN_ROWS),
        _drawn(_written(held_out_examples("banking"))),
    )


def read_task(text: str) -> Task:
    """NAME=TRAIN,DEV."""
    name, _, files = text.partition("=")
    rows, held_out = (read_examples(Path(file), written=True) for file in files.split(","))
    return Task(name, _drawn(rows, TRAIN_ROWS), _drawn(held_out))


def _written(examples: Examples) -> Examples:
    turns = [
        (Turn(PROMPT, f"Request: {text}\nIntent:"), Turn(COMPLETION, " " + str(label).replace("_", " ")))
        for text, label in zip(examples.texts, examples.labels, strict=True)
    ]
    return Examples([""] * len(turns), None, [""] * len(turns), examples.name, turns=turns)


def _drawn(examples: Examples, count: int = HELD_OUT_ROWS) -> Examples:
    return examples.take(np.random.default_rng(0).permutation(len(examples))[:count].tolist())


def run(task: Task, setup: str, factor: float, seed: int, checkpoint: Checkpoint, basis: Basis) -> dict[str, Any]:
    """Train at `factor` times the default rate of classifiers; the scores of the better epoch."""
    rate = default_rate(basis.total_rank, factor)
    settings = TrainSettings(epochs=EPOCHS, batch_size=BATCH_SIZE, max_length=LENGTH, seed=seed, learning_rate=rate)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        record = train(checkpoint, basis, task.train, task.held_out, settings, Path(work)).training
    return {
        **{"task": task.name, "setup": setup, "coefficients": basis.total_rank, "factor": factor, "seed": seed},
        **{name: record[name] for name in ("learning_rate", "steps", "baseline", "metrics", "loss", "device")},
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row for each task and set-up; exact match in percent, mean and spread over the seeds, by factor."""
    head = ["task", "coefficients", "default rate", "seeds", *(f"{factor:g} x" for factor in FACTORS)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for task, count in sorted({(entry["task"], entry["coefficients"]) for entry in runs}):
        mine = [entry for entry in runs if (entry["task"], entry["coefficients"]) == (task, count)]
        cells = []
        for factor in FACTORS:
            found = [100 * entry["metrics"]["exact_match"] for entry in mine if entry["factor"] == factor]
            cells.append(f"{np.mean(found):.1f} ± {np.std(found):.1f}" if found else "–")
        seeds = len({entry["seed"] for entry in mine})
        lines.append(f"| {task} | {count:,} | {default_rate(count)} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or hub name of a decoder")
    parser.add_argument("--task", dest="tasks", type=read_task, action="append", default=[], help="NAME=TRAIN,DEV")
    parser.add_argument("--setups", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.base)
    what = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "base": checkpoint.name, "base_digest": checkpoint.digest}
    runs: list[dict[str, Any]] = json.loads(arguments.out.read_text())["runs"] if arguments.out.is_file() else []
    done = {tuple(entry[name] for name in ("task", "setup", "factor", "seed")) for entry in runs}
    for setup in arguments.setups:
        basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), SETUPS[setup]), EnergyShare(0.5))
        for task, factor, seed in product([banking(), *arguments.tasks], FACTORS, arguments.seeds):
            if (task.name, setup, factor, seed) not in done:
                runs.append(run(task, setup, factor, seed, checkpoint, basis))
                print(runs[-1], file=sys.stderr, flush=True)
                write_json(arguments.out, {"environment": environment("cpu"), **what, "runs": runs})
    print(table(runs))


if __name__ == "__main__":
    main()
