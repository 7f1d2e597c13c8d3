"""Customers per hour: a fleet, against PEFT's LoRA and `train` on one customer after another.

    python -m benchmarks.fleet [--customers N] [--device cpu|cuda] [--model FOLDER | --shape minilm|mpnet]
                               [--targets paper|linear] [--data FOLDER]
                               [--profile | --profile-only | --host-only] [--out FILE.json]

The fleet adapts the query projections of the last four blocks, which is the paper's set-up, or every linear
layer of every block. PEFT's LoRA adapts the same layers, and in a second loop what LoRA customarily
adapts, query and value of every block. Rows, epochs, batch size and precision are the same for all; no
dropout and no evaluation. First a few customers of a small fleet are
held against `train` alone. Then, in each round, PEFT trains a sample of the customers in a plain
PyTorch loop on a base that is loaded once, and the fleet trains all of them. transformers' Trainer
with PEFT is measured once, and so is `train`, which loads the base for each customer. What these
would take for all customers is extrapolated from the medians of their samples. In the fleet's time are
reading the data, loading the base, tokenizing, the trunk and writing the files.

With `--profile` one more fleet is trained after the others, with each stage timed, and a small one of
which a single step is looked into: where the seconds go, kernel by kernel. `--profile-only` leaves the
others out. `--host-only` does so too, and computes no block of the base: what is left is what the host
does for each customer.

Beside wall clock stands the CPU time of the process, which other work on the machine hardly moves.
"""

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common.layers import targets_of
from benchmarks.common.measuring import environment
from benchmarks.fleet.agreement import BOUND, relative_difference
from benchmarks.fleet.peers import Cost, cost_of, open_peer, train_by_trainer, train_in_loop
from benchmarks.fleet.profile import Split, StepView, lines, without_blocks
from benchmarks.fleet.setup import TARGETS, Bench, build
from benchmarks.fleet.shards import customer_name
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.sample import FOLDER
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.adapter import resolve_layer
from qrlora_deploy.training.fleet.options import ROWS_PER_STEP
from qrlora_deploy.training.trainer import train

LOOP, TRAINER, ALONE = "PEFT LoRA, plain loop", "PEFT LoRA, transformers' Trainer", "train"
CUSTOMARY = "PEFT LoRA on q and v of all layers, plain loop"


def measure(bench: Bench, sample: int, rounds: int) -> dict[str, Any]:
    """Check, then measure; returns the record."""
    device = bench.settings.device
    numbers = [index * bench.customers // sample for index in range(sample)]
    customers = bench.examples(numbers)
    few = max(1, sample // 2)
    alone, errors = check(bench, numbers[:few], customers[:few])
    targets = [resolve_layer(bench.checkpoint.skeleton(), name)[0] for name in bench.basis.names]
    peer = open_peer(bench.checkpoint, targets, bench.settings, device)
    loops = {LOOP: peer, CUSTOMARY: replace(peer, targets=targets_of(bench.checkpoint.skeleton(), ("query", "value")))}
    for one in loops.values():
        train_in_loop(one, customers[0])  # warms caches and libraries; not counted
    looped: dict[str, list[Cost]] = {name: [] for name in loops}
    fleet: list[Cost] = []
    file = bench.write_data(range(bench.customers))
    for turn in range(rounds):
        for name, one in loops.items():
            looped[name] += [cost_of(functools.partial(train_in_loop, one, examples)) for examples in customers]
        fleet.append(cost_of(functools.partial(bench.run_fleet, f"round-{turn}", file)))
        print(f"round {turn}: the fleet took {fleet[-1].seconds:.1f} s", file=sys.stderr)
    by_trainer = train_by_trainer(bench.folder / "trainer")
    trainer = [cost_of(functools.partial(by_trainer, peer, examples)) for examples in customers[:few]]
    return compare(bench.customers, fleet, {**looped, TRAINER: trainer, ALONE: alone}) | {
        "largest_relative_difference_to_train": errors,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def look_into(bench: Bench) -> dict[str, Any]:
    """Where the seconds of a fleet go, and one of its steps."""
    device = bench.settings.device
    view = StepView(device)
    few = (bench.rows_per_step or ROWS_PER_STEP[device]) // bench.settings.batch_size
    with view.watch():
        # It is also the run that warms up what the other one is timed with.
        bench.run_fleet("step", bench.write_data(range(min(few, bench.customers))))
    return split_up(bench) | {"step": view.found}


def split_up(bench: Bench) -> dict[str, Any]:
    """The seconds of each stage of a fleet."""
    split, file = Split(bench.settings.device), bench.write_data(range(bench.customers))
    with split.watch():
        cost = cost_of(functools.partial(bench.run_fleet, "split", file))
    return {"split": split.record(cost.seconds) | {"cpu_seconds": cost.cpu_seconds}, "step": {}}


def look_at_host(bench: Bench, rounds: int) -> dict[str, Any]:
    """The same without the blocks of the base, of the round that took least of the processor."""
    with without_blocks():
        found = [split_up(replace(bench, folder=_made(bench.folder / f"host-{turn}"))) for turn in range(rounds)]
    least = min(found, key=lambda record: record["split"]["cpu_seconds"])
    milliseconds = [1000 * record["split"]["cpu_seconds"] / bench.customers for record in found]
    return least | {"cpu_ms_a_customer": milliseconds}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def check(bench: Bench, numbers: Sequence[int], customers: list[Examples]) -> tuple[list[Cost], dict[str, float]]:
    """Hold some customers of a fleet against themselves alone, in fp32 and as they are measured.

    Returns:
        What each took alone, and the largest difference of its coefficients by the largest one; in bf16
        that says how far roundings go, and has no bound.

    Raises:
        SystemExit: in fp32 it is more than rounding explains.
    """
    with patch("torch.cuda.is_bf16_supported", return_value=False):
        _, exact = differences(bench, "fp32", numbers[:1], customers[:1])
    print(f"fleet against alone in fp32: {exact}", file=sys.stderr)
    if max(exact.values()) > BOUND:
        raise SystemExit(f"customers of the fleet differ from themselves alone: {exact}")
    costs, found = differences(bench, "measured", numbers, customers)
    print(f"fleet against alone as measured: {found}", file=sys.stderr)
    return costs, {f"{name} in fp32": error for name, error in exact.items()} | found


def differences(
    bench: Bench, name: str, numbers: Sequence[int], customers: list[Examples]
) -> tuple[list[Cost], dict[str, float]]:
    """What some customers take alone, and by how much they differ from a fleet of them."""
    output = bench.run_fleet(f"fleet-{name}", bench.write_data(numbers))
    costs, errors = [], {}
    for number, examples in zip(numbers, customers, strict=True):
        found: list[Coefficients] = []

        def run(number: int = number, examples: Examples = examples, found: list[Coefficients] = found) -> None:
            folder = bench.folder / f"alone-{name}-{number}"
            found.append(train(bench.checkpoint, bench.basis, examples, None, bench.settings, folder))

        costs.append(cost_of(run))
        expected = found[0].values
        values = read_coefficients(output / f"{customer_name(number)}.safetensors").values
        errors[customer_name(number)] = relative_difference(values, expected)
    return costs, errors


def compare(customers: int, fleet: list[Cost], others: dict[str, list[Cost]]) -> dict[str, Any]:
    """Customers an hour of each, and how many times that of the others the fleet trains."""

    def middle(costs: list[Cost], what: Callable[[Cost], float]) -> float:
        return statistics.median(what(cost) for cost in costs)

    seconds = middle(fleet, lambda cost: cost.seconds) / customers
    cpu_seconds = middle(fleet, lambda cost: cost.cpu_seconds) / customers
    peers = {
        name: {
            "runs": [asdict(cost) for cost in costs],
            "customers_an_hour": 3600 / middle(costs, lambda cost: cost.seconds),
            "fleet_times": middle(costs, lambda cost: cost.seconds) / seconds,
            "fleet_times_by_cpu_seconds": middle(costs, lambda cost: cost.cpu_seconds) / cpu_seconds,
        }
        for name, costs in others.items()
    }
    runs = [asdict(cost) for cost in fleet]
    return {"fleet": {"runs": runs, "customers_an_hour": 3600 / seconds}, "others_extrapolated_from_samples": peers}


def plain(value: object) -> str:
    """An option for the record, which need not know where this machine keeps its folders."""
    return value.name if isinstance(value, Path) else str(value)


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
    parser.add_argument("--shape", choices=["minilm", "mpnet"], default="minilm", help="random, without --model")
    parser.add_argument("--targets", choices=list(TARGETS), default="paper", help="what the fleet adapts")
    parser.add_argument("--data", type=Path, default=FOLDER)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--profile", action="store_true", help="also say where the seconds of a fleet go")
    which.add_argument("--profile-only", action="store_true", help="say that and measure nothing else")
    which.add_argument("--host-only", action="store_true", help="the same without the arithmetic of the base")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = build(options, Path(temporary))
        record = environment(options.device) | {
            "options": {name: plain(value) for name, value in vars(options).items() if name != "out"},
            "coefficients": bench.basis.total_rank,
            "threads": torch.get_num_threads(),
        }
        if options.host_only:
            record["profile"] = look_at_host(bench, options.rounds)
        elif not options.profile_only:
            record |= measure(bench, min(options.sample, options.customers), options.rounds)
        if options.profile or options.profile_only:
            record["profile"] = look_into(bench)
    if "fleet" in record:
        report(record)
    if "profile" in record:
        print("\n".join(lines(record["profile"])))
    if options.out:
        write_json(options.out, record)
    return 0


def report(record: dict[str, Any]) -> None:
    """Print customers an hour."""
    print(f"fleet: {record['fleet']['customers_an_hour']:.0f} customers an hour")
    for name, found in record["others_extrapolated_from_samples"].items():
        print(
            f"{name}: {found['customers_an_hour']:.0f} an hour; the fleet trains {found['fleet_times']:.1f} times that "
            f"({found['fleet_times_by_cpu_seconds']:.1f} by CPU time)"
        )


if __name__ == "__main__":
    sys.exit(main())
