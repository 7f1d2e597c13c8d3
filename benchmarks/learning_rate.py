"""Does the default learning rate fit bases of any size? Set-ups of 300 to 10,000 coefficients at 0.3, 1 and 3 times it.

    python -m benchmarks.learning_rate --task banking --task SST-2=SST-2/train.tsv,SST-2/dev.tsv \\
        --bases /tmp/bases --out benchmarks/results/learning_rate.json

MiniLM, warmed up on rows of the task; then coefficients alone for 3 epochs of 600 other rows. The score is the
accuracy of the last step on held-out rows, and nothing is chosen by it. A task is NAME=TRAIN,DEV with one text and a
class in each row, or banking, the quickstart's customer on the quickstart's base. The file is written anew after each
run, and what it holds already is not run again; the bases stay in --bases for the next time.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measuring import environment
from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.data.sample import general_examples, held_out_examples, train_examples
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.quickstart.measuring import Scorer
from qrlora_deploy.quickstart.run import WARMUP_EPOCHS, WARMUP_RATE, find_encoder
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.training.settings import TrainSettings, WarmupSettings, default_rate
from qrlora_deploy.training.trainer import train
from qrlora_deploy.training.warmup import warmup

LENGTH, EPOCHS = 64, 3
WARM_ROWS, TRAIN_ROWS, HELD_OUT_ROWS = 600, 600, 500
FACTORS = (0.3, 1.0, 3.0)
"""Of the default rate."""

SETUPS: dict[str, tuple[list[str], int | None, float]] = {
    "query and value of the last 4 layers": (["query", "value"], 4, 0.5),
    "all linear layers, tau 0.95": ([], None, 0.95),
    "query of the last 4 layers": (["query"], 4, 0.5),
    "all linear layers": ([], None, 0.5),
}
"""Targets, last layers and tau."""


@dataclass(frozen=True)
class Task:
    """Rows, and how the base is warmed up for them."""

    name: str
    warm: Examples
    train: Examples
    held_out: Examples
    warm_settings: WarmupSettings


def banking() -> Task:
    """The quickstart's first customer on the quickstart's base."""
    warm = WarmupSettings(epochs=WARMUP_EPOCHS, learning_rate=WARMUP_RATE, max_length=LENGTH, device="cpu")
    rows = train_examples("banking")
    order = np.random.default_rng(0).permutation(len(rows))[:TRAIN_ROWS]
    return Task("banking", general_examples(), _chosen(rows, order), held_out_examples("banking"), warm)


def read_task(text: str) -> Task:
    """NAME=TRAIN,DEV: the rows of the warm-up and of the training are drawn from TRAIN and have none in common."""
    if text == "banking":
        return banking()
    name, _, files = text.partition("=")
    parts = [read_examples(Path(file)) for file in files.split(",")]
    order = np.random.default_rng(0).permutation(len(parts[0]))
    dev = np.random.default_rng(0).permutation(len(parts[1]))[:HELD_OUT_ROWS]
    warm = WarmupSettings(epochs=3, learning_rate=1e-4, max_length=LENGTH, device="cpu")
    train_rows = order[WARM_ROWS : WARM_ROWS + TRAIN_ROWS]
    return Task(name, _chosen(parts[0], order[:WARM_ROWS]), _chosen(parts[0], train_rows), _chosen(parts[1], dev), warm)


def _chosen(examples: Examples, rows: Sequence[int] | np.ndarray) -> Examples:
    return Examples([examples.texts[row] for row in rows], None, [examples.labels[row] for row in rows], examples.name)


def make_bases(task: Task, setups: Sequence[str], folder: Path) -> tuple[Checkpoint, dict[str, Basis]]:
    """The warmed-up base of a task, which may be there already, and a basis of it for each set-up."""
    if not folder.exists():
        warmup(find_encoder(), task.warm, None, folder, task.warm_settings)
    checkpoint = open_checkpoint(str(folder))
    bases = {}
    for setup in setups:
        patterns, last_layers, tau = SETUPS[setup]
        names = choose_targets(checkpoint.skeleton(), patterns, last_layers)
        bases[setup] = factorize(checkpoint, names, EnergyShare(tau))
    return checkpoint, bases


def run(task: Task, setup: str, checkpoint: Checkpoint, basis: Basis, factor: float) -> dict[str, Any]:
    """Train at `factor` times the default rate and score the last step."""
    rate = factor * default_rate(basis.total_rank)
    settings = TrainSettings(epochs=EPOCHS, max_length=LENGTH, device="cpu", learning_rate=rate)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        customer = train(checkpoint, basis, task.train, None, settings, Path(work))
    seconds = time.perf_counter() - start
    scorer = Scorer(checkpoint, basis, LENGTH)
    return {
        "task": task.name,
        "setup": setup,
        "coefficients": basis.total_rank,
        "factor": factor,
        "learning_rate": rate,
        "start": scorer.accuracy(task.held_out, None).all_labels,
        "accuracy": scorer.accuracy(task.held_out, customer.values).all_labels,
        "loss": customer.training["loss"],
        "seconds": round(seconds, 1),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row for each task and set-up, a column for each factor."""
    lines = [
        "| task | coefficients | default rate | start | " + " | ".join(f"{factor:g} x" for factor in FACTORS) + " |",
        "| --- " * (4 + len(FACTORS)) + "|",
    ]
    for task, count in sorted({(entry["task"], entry["coefficients"]) for entry in runs}):
        mine = {e["factor"]: e for e in runs if (e["task"], e["coefficients"]) == (task, count)}
        cells = [f"{mine[factor]['accuracy']:.3f}" if factor in mine else "–" for factor in FACTORS]
        start = next(iter(mine.values()))["start"]
        lines.append(f"| {task} | {count:,} | {default_rate(count)} | {start:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", dest="tasks", type=read_task, action="append", required=True, help="banking, or NAME=TRAIN,DEV"
    )
    parser.add_argument("--setups", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--bases", type=Path, required=True, help="folder of the warmed-up bases, by name of the task")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    what = {"epochs": EPOCHS, "train_rows": TRAIN_ROWS, "warm_rows": WARM_ROWS, "model": "all-MiniLM-L6-v2"}
    runs: list[dict[str, Any]] = json.loads(arguments.out.read_text())["runs"] if arguments.out.is_file() else []
    done = {(entry["task"], entry["setup"], entry["factor"]) for entry in runs}
    for task in arguments.tasks:
        checkpoint, bases = make_bases(task, arguments.setups, arguments.bases / task.name)
        for setup, factor in product(arguments.setups, FACTORS):
            if (task.name, setup, factor) in done:
                continue
            runs.append(run(task, setup, checkpoint, bases[setup], factor))
            print(runs[-1], file=sys.stderr, flush=True)
            write_json(arguments.out, {"environment": environment("cpu"), **what, "runs": runs})
    print(table(runs))


if __name__ == "__main__":
    main()
