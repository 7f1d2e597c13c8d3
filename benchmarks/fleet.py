"""Customers per hour: a fleet, against PEFT's LoRA and `train` on one customer after another.

    python -m benchmarks.fleet [--customers N] [--device cpu|cuda] [--model FOLDER | --shape minilm|mpnet]
                               [--data FOLDER] [--out FILE.json]

Same targets (the query projections of the last four blocks, the paper's set-up), rows, epochs, batch
size and precision for all; no dropout and no evaluation. First a few customers of the fleet are held
against `train` alone. Then, in each round, PEFT trains a sample of the customers in a plain PyTorch
loop on a base that is loaded once, and the fleet trains all of them; what PEFT would take for all is
the median of its sample times the number of customers. Samples by transformers' Trainer and by
`train`, which loads the base for each customer, are taken once. Reading the data, tokenizing, the
trunk and writing the files are in the fleet's time; loading the base is too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fleet_parts.peers import Peer, open_peer, seconds_of, train_by_trainer, train_in_loop
from benchmarks.fleet_parts.shards import SHAPES, read_shards, save_shape
from benchmarks.records import environment
from qrlora_deploy.adapter import resolve_layer
from qrlora_deploy.basis import Basis
from qrlora_deploy.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.coefficients import read_coefficients
from qrlora_deploy.factorizing import factorize
from qrlora_deploy.files import write_json
from qrlora_deploy.rank_rule import RankRule
from qrlora_deploy.targets import choose_targets
from qrlora_deploy.training.data import Examples
from qrlora_deploy.training.fleet.grouping import read_groups
from qrlora_deploy.training.fleet.options import FleetOptions, FleetReport
from qrlora_deploy.training.fleet.plan import FleetSource
from qrlora_deploy.training.fleet.run import train_fleet
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.trainer import train

LAST_LAYERS = 4
TAU = 0.5
QUERIES = ("query", "q", "q_lin", "q_proj")
BUNDLED = Path(__file__).parents[1] / "qrlora_deploy" / "quickstart" / "clinc150"
BOUNDS = {"cpu": 1e-4, "cuda": 0.2}
"""Of a customer in the fleet against itself alone, largest difference by largest value. bf16 keeps three
digits, and batches of other shapes round otherwise; Adam carries that through every step."""


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        checkpoint: the base.
        basis: of its query projections.
        file: the rows of all customers.
        customers: the same, by id.
        settings: of every run.
        rows_per_step: of the fleet, or None.
        folder: for everything that is written.
    """

    checkpoint: Checkpoint
    basis: Basis
    file: Path
    customers: dict[str, Examples]
    settings: TrainSettings
    rows_per_step: int | None
    folder: Path

    def run_fleet(self, name: str) -> FleetReport:
        """Train all customers into a folder of that name."""
        options = FleetOptions(self.folder / name, rows_per_step=self.rows_per_step)
        source = FleetSource(self.file, customer_column="customer")
        return train_fleet(self.checkpoint, self.basis, source, self.settings, options)

    def sample(self, count: int) -> list[Examples]:
        """Customers spread over all of them."""
        names = sorted(self.customers)
        return [self.customers[names[index * len(names) // count]] for index in range(count)]


def measure(bench: Bench, sample: int, rounds: int) -> dict[str, Any]:
    """Check, then measure; returns the record."""
    device = bench.settings.device
    checked = check(bench, min(3, sample))
    targets = [resolve_layer(bench.checkpoint.skeleton(), name)[0] for name in bench.basis.names]
    peer = open_peer(bench.checkpoint, targets, bench.settings, device)
    customers = bench.sample(sample)
    seconds_of(train_in_loop, peer, customers[:1])  # warms caches and libraries; not counted
    loop: list[float] = []
    fleet: list[float] = []
    for number in range(rounds):
        loop += seconds_of(train_in_loop, peer, customers)
        start = time.perf_counter()
        report = bench.run_fleet(f"round-{number}")
        fleet.append(time.perf_counter() - start)
        count = report.count("trained")
        print(f"round {number}: fleet {3600 * count / fleet[-1]:.0f} customers an hour", file=sys.stderr)
    others = seconds_others(bench, peer, customers[: max(1, sample // 2)])
    return compare(len(bench.customers), fleet, {"PEFT LoRA, plain loop": loop, **others}) | {
        "checked": checked,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def seconds_others(bench: Bench, peer: Peer, customers: list[Examples]) -> dict[str, list[float]]:
    """Seconds a customer of the peers that are measured once."""
    alone = []
    trainer = seconds_of(train_by_trainer(bench.folder / "trainer"), peer, customers)
    for number, examples in enumerate(customers):
        start = time.perf_counter()
        train(bench.checkpoint, bench.basis, examples, None, bench.settings, bench.folder / f"alone-{number}")
        alone.append(time.perf_counter() - start)
    return {"PEFT LoRA, transformers' Trainer": trainer, "train": alone}


def compare(customers: int, fleet: list[float], others: dict[str, list[float]]) -> dict[str, Any]:
    """Customers an hour of each, and how many times that of the others the fleet trains."""
    rate = 3600 * customers / statistics.median(fleet)
    peers = {
        name: {
            "seconds_a_customer": samples,
            "customers_an_hour": 3600 / statistics.median(samples),
            "fleet_times": rate * statistics.median(samples) / 3600,
        }
        for name, samples in others.items()
    }
    return {"fleet": {"seconds": fleet, "customers_an_hour": rate}, "others_extrapolated_from_samples": peers}


def check(bench: Bench, count: int) -> dict[str, float]:
    """Largest difference between customers of a fleet and themselves alone, by the largest value.

    Raises:
        SystemExit: it is more than rounding explains.
    """
    bench.run_fleet("checked")
    errors = {}
    names = sorted(bench.customers)
    for name in [names[index * len(names) // count] for index in range(count)]:
        examples = bench.customers[name]
        alone = train(bench.checkpoint, bench.basis, examples, None, bench.settings, bench.folder / f"check-{name}")
        found = read_coefficients(bench.folder / "checked" / f"{name}.safetensors")
        errors[name] = float(np.abs(found.values - alone.values).max() / np.abs(alone.values).max())
    print(f"fleet against alone: {errors}", file=sys.stderr)
    if max(errors.values()) > BOUNDS[bench.settings.device]:
        raise SystemExit(f"customers of the fleet differ from themselves alone: {errors}")
    return errors


def build(options: argparse.Namespace, folder: Path) -> Bench:
    """Base, basis and customers."""
    shards = read_shards(options.data)
    if options.model is None:
        save_shape(folder / "base", options.shape, shards)
    checkpoint = open_checkpoint(str(options.model or folder / "base"))
    layers = [name.rsplit(".", 1)[-1] for name, _ in checkpoint.skeleton().named_modules()]
    query = next(name for name in QUERIES if name in layers)
    targets = choose_targets(checkpoint.skeleton(), [query], LAST_LAYERS)
    basis = factorize(checkpoint, targets, RankRule(tau=TAU))
    file = folder / "customers.tsv"
    shards.write(file, options.customers, options.rows, seed=0)
    groups = read_groups(file, "customer", None, None, lambda _: True)
    settings = TrainSettings(epochs=options.epochs, batch_size=options.batch_size, max_length=64, device=options.device)
    return Bench(checkpoint, basis, file, groups.examples, settings, options.rows_per_step, folder)


def main() -> int:
    """Parse, measure, print, and write the record where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=16)
    parser.add_argument("--rows", type=int, default=150, help="training rows of each customer")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rows-per-step", type=int)
    parser.add_argument("--sample", type=int, default=4, help="customers that the others train")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="a base whose head knows the labels of the data")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="minilm", help="random weights, without --model")
    parser.add_argument("--data", type=Path, default=BUNDLED)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = build(options, Path(temporary))
        record = environment(options.device) | {
            "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
            "coefficients": bench.basis.total_rank,
            "threads": torch.get_num_threads(),
            **measure(bench, options.sample, options.rounds),
        }
    print(f"fleet: {record['fleet']['customers_an_hour']:.0f} customers an hour")
    for name, found in record["others_extrapolated_from_samples"].items():
        print(
            f"{name}: {found['customers_an_hour']:.0f} an hour; the fleet trains {found['fleet_times']:.1f} times that"
        )
    if options.out:
        write_json(options.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
