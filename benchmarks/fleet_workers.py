"""A fleet by torchrun: customers an hour of several workers, each with its own shard, beside one worker.

    python -m benchmarks.fleet_workers [--customers N] [--workers N] [--device cpu|cuda] [--shape minilm|mpnet]
                                       [--rounds N] [--out FILE.json]

`qrlora-deploy train-fleet` runs as a user runs it, in turn with one worker and with several; a worker has a
GPU of its own, or on a CPU its share of the cores. First the shards' files are held against one
worker's: the same customers, and the same coefficients but for rounding. Times are those of the whole command,
with its start, which takes some seconds whatever there is to train. Random weights of the shape, the query
projections of the last four blocks, rows of CLINC150.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.layers import LAST_LAYERS, TAU, targets_of
from benchmarks.common.measuring import environment
from benchmarks.fleet.agreement import BOUND, relative_difference
from benchmarks.fleet.shards import read_shards, save_shape
from qrlora_deploy.data.sample import FOLDER
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import write_basis
from qrlora_deploy.formats.coefficients import read_coefficients
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.rank_rules.energy_share import EnergyShare

BOUNDS = {"cpu": BOUND, "cuda": 0.1}
"""Of a customer in its shard against itself among all: fp32 on a CPU; on a GPU bf16, whose roundings depend on the
neighbours in a matrix product."""


@dataclass(frozen=True)
class Launch:
    """How the command is run.

    Attributes:
        folder: with base, basis and data; outputs go there too.
        device: "cpu" or "cuda".
        epochs: of every customer.
    """

    folder: Path
    device: str
    epochs: int

    def run(self, workers: int, output: str) -> float:
        """Train all customers; returns the seconds of the whole command.

        Raises:
            SystemExit: it failed.
        """
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        options = ["--basis", "basis.safetensors", "--data", "all.tsv", "--customer-column", "customer"]
        settings = ["--epochs", self.epochs, "--max-length", 64, "--device", self.device, "-o", output]
        command = [*launcher, "-m", "qrlora_deploy.cli", "train-fleet", "base", *options, *settings]
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{workers} workers failed: {done.stderr[-2000:]}")
        return seconds


def prepare(folder: Path, shape: str, customers: int, rows: int) -> None:
    """Write base, basis and data."""
    shards = read_shards(FOLDER)
    save_shape(folder / "base", shape, shards)
    checkpoint = open_checkpoint(str(folder / "base"))
    targets = targets_of(checkpoint.skeleton(), ["query"], LAST_LAYERS)
    write_basis(factorize(checkpoint, targets, EnergyShare(TAU)), folder / "basis.safetensors")
    shards.write(folder / "all.tsv", range(customers), rows)


def check(one: Path, several: Path, bound: float) -> dict[str, float]:
    """Hold the files of some workers against those of one.

    Returns:
        The median and the largest over the customers of the largest difference by the largest value.

    Raises:
        SystemExit: a customer is missing, or differs by more than `bound`.
    """
    names = sorted(path.name for path in one.glob("*.safetensors"))
    if not names or names != sorted(path.name for path in several.glob("*.safetensors")):
        raise SystemExit("the shards do not make up the whole fleet")
    found = []
    for name in names:
        expected, values = (read_coefficients(folder / name).values for folder in (one, several))
        found.append(relative_difference(values, expected))
    if max(found) > bound:
        raise SystemExit(f"{names[int(np.argmax(found))]} differs by {max(found):.3g} of its largest coefficient")
    return {"customers": len(names), "median": statistics.median(found), "largest": max(found)}


def measure(launch: Launch, workers: int, rounds: int, customers: int) -> dict[str, Any]:
    """Run both in turn, check the first round; returns what goes into the record."""
    seconds: dict[int, list[float]] = {1: [], workers: []}
    differences: dict[str, float] = {}
    for turn in range(rounds):
        for count in seconds:
            seconds[count].append(launch.run(count, f"{count}-{turn}"))
            print(f"round {turn}, {count} workers: {seconds[count][-1]:.1f} s", file=sys.stderr, flush=True)
        if not turn:
            differences = check(launch.folder / "1-0", launch.folder / f"{workers}-0", BOUNDS[launch.device])
    hourly = {count: 3600 * customers / statistics.median(found) for count, found in seconds.items()}
    return {
        "seconds": seconds,
        "customers_an_hour": hourly,
        "times": hourly[workers] / hourly[1],
        "relative_difference": differences,
    }


def main() -> int:
    """Parse, measure, print, and write the record where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=16)
    parser.add_argument("--rows", type=int, default=150, help="training rows of each customer")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, help="default: the GPUs, or 2 on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=["minilm", "mpnet"], default="minilm")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    workers = options.workers or (torch.cuda.device_count() if options.device == "cuda" else 2)
    if workers < 2:
        parser.error("it takes two workers or more; on one GPU --workers 2 has them share it")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, options.shape, options.customers, options.rows)
        launch = Launch(folder, options.device, options.epochs)
        found = measure(launch, workers, options.rounds, options.customers)
    record = environment(options.device) | {
        "options": {name: value for name, value in vars(options).items() if name != "out"} | {"workers": workers},
        **found,
    }
    print(f"{workers} workers train {found['times']:.2f} times the customers an hour of one: {found}")
    if options.out:
        write_json(options.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
