"""Does dropout in the frozen base help coefficients? The same customers with and without it.

    python -m benchmarks.dropout --device cuda --out benchmarks/results/dropout.json

MiniLM, warmed up as the quickstart does it on the sample of all CLINC150 intents; customers are three of its
domains. Two bases of coefficients: every linear layer, and the query projections of the last 4 layers; and the first of
them with an output layer of the customer's own. What the file to write holds already is not run again.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common.measuring import environment
from qrlora_deploy.data.sample import CUSTOMERS, general_examples, held_out_examples, train_examples
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.quickstart.run import WARMUP_EPOCHS, WARMUP_RATE, find_encoder
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.training.settings import TrainSettings, WarmupSettings
from qrlora_deploy.training.trainer import train
from qrlora_deploy.training.warmup import warmup

LENGTH = 64
SETUPS: dict[str, tuple[list[str], int | None, str]] = {
    "all linear layers": ([], None, "frozen"),
    "all linear layers, own output layer": ([], None, "output"),
    "query of the last 4 layers": (["query"], 4, "frozen"),
}
"""Targets, last layers and head; the learning rate is the default of `train`."""

KEY = ("setup", "customer", "seed", "dropout")


def warm_up(folder: Path, device: str) -> Path:
    """Make the base of the quickstart."""
    settings = WarmupSettings(epochs=WARMUP_EPOCHS, learning_rate=WARMUP_RATE, max_length=LENGTH, device=device)
    warmup(find_encoder(), general_examples(), None, folder, settings)
    return folder


def measure(checkpoint: Checkpoint, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Accuracy on held-out text in the best of the epochs, of every run."""
    found: list[dict[str, Any]] = []
    if arguments.out and arguments.out.is_file():
        found = json.loads(arguments.out.read_text())["runs"]
    done = {tuple(run[name] for name in KEY) for run in found}
    for setup in arguments.setups:
        patterns, last_layers, head = SETUPS[setup]
        names = choose_targets(checkpoint.skeleton(), patterns, last_layers)
        basis = factorize(checkpoint, names, EnergyShare(0.5))
        for customer, seed, dropout in product(arguments.customers, arguments.seeds, (False, True)):
            if (setup, customer, seed, dropout) in done:
                continue
            settings = TrainSettings(
                epochs=arguments.epochs,
                max_length=LENGTH,
                seed=seed,
                device=arguments.device,
                patience=arguments.epochs,
                head=head,
                dropout=dropout,
            )
            data = train_examples(customer), held_out_examples(customer)
            start = time.perf_counter()
            record = train(checkpoint, basis, *data, settings, folder / f"run-{len(found)}").training
            seconds = time.perf_counter() - start
            run = {"setup": setup, "customer": customer, "seed": seed, "dropout": dropout, "seconds": seconds}
            kept = {name: record[name] for name in ("learning_rate", "loss")}
            found.append(run | {"accuracy": record["metrics"]["accuracy"]} | kept)
            print(found[-1], file=sys.stderr, flush=True)
            write(found, arguments)
    return found


def write(runs: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write what there is so far, so that a run that is stopped has not been for nothing."""
    if arguments.out:
        made = {"environment": environment(arguments.device), "epochs": arguments.epochs}
        write_json(arguments.out, made | {"table": summary(runs), "runs": runs})


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, without and with dropout."""
    lines = []
    for setup, customer in dict.fromkeys((run["setup"], run["customer"]) for run in runs):
        line: dict[str, Any] = {"setup": setup, "customer": customer}
        for name, dropout in (("without", False), ("with", True)):
            values = [
                run["accuracy"]
                for run in runs
                if (run["setup"], run["customer"], run["dropout"]) == (setup, customer, dropout)
            ]
            if not values:
                continue
            line[name] = mean(values)
            line[f"{name}_deviation"] = stdev(values) if len(values) > 1 else 0.0
        lines.append(line)
    return lines


def main() -> None:
    """Parse, warm up, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--customers", nargs="+", default=list(CUSTOMERS))
    parser.add_argument("--base", type=Path, help="the quickstart's base, where it is there already")
    parser.add_argument("--setups", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = arguments.base or warm_up(folder / "base", arguments.device)
        runs = measure(open_checkpoint(str(base)), arguments, folder)
    lines = summary(runs)
    for line in lines:
        pairs = (f"{name} {line[name]:.4f} ± {line[f'{name}_deviation']:.4f}" for name in ("without", "with"))
        print(f"{line['setup']:36} {line['customer']:20} {'  '.join(pairs)}")


if __name__ == "__main__":
    main()
