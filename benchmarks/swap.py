"""Swapping a customer in a live session: from memory, from disk, the first answer after it, runs beside it.

    python -m benchmarks.swap --provider cpu -o benchmarks/results/swap_cpu.json

One process, kinds of samples in turn. "run beside swaps" is measured while another thread swaps
`--swaps-per-second` times a second.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measuring import environment, summary
from benchmarks.common.serving import Serving, make_inputs, prepare
from qrlora_deploy.formats.coefficients import write_coefficients
from qrlora_deploy.io.files import write_json
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.runtime import Buckets, SwitchableSession


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build, check, time; returns the record that is written."""
    rule = FixedRank(arguments.rank) if arguments.rank else EnergyShare(0.5)
    serving = prepare(folder, arguments.model, 2, rule, arguments.provider, arguments.precision)
    buckets = Buckets((arguments.batch,), (arguments.length,)) if arguments.cuda_graph else None
    session = SwitchableSession(serving.switchable, arguments.provider, buckets=buckets)
    versions = list(serving.customers.values())
    files = [folder / f"{index}.safetensors" for index in range(len(versions))]
    for version, file in zip(versions, files, strict=True):
        write_coefficients(version, file)
    inputs = make_inputs(serving.merged, arguments.batch, arguments.length)
    owners = ["acme"] * arguments.batch
    _check(session, serving, inputs, owners)
    kinds: dict[str, list[float]] = {
        "swap from memory": [],
        "first run after it": [],
        "run": [],
        "swap from disk": [],
    }
    for turn in range(arguments.runs):
        _time(kinds["swap from memory"], session.load, "acme", versions[turn % 2])
        _time(kinds["first run after it"], session.predict, inputs, owners)
        _time(kinds["run"], session.predict, inputs, owners)
        _time(kinds["swap from disk"], session.load, "acme", files[(turn + 1) % 2])
    beside, swaps = _run_beside_swaps(session, serving, inputs, owners, arguments)
    return {
        "model": arguments.model,
        "total_rank": serving.basis.total_rank,
        "batch": arguments.batch,
        "length": arguments.length,
        "provider": arguments.provider,
        "precision": arguments.precision,
        "cuda_graph": arguments.cuda_graph,
        "latency_us": {name: summary(values, 1e6) for name, values in kinds.items()}
        | {"run beside swaps": summary(beside, 1e6)},
        "swaps_per_second": swaps,
        "environment": environment(arguments.provider),
    }


def _time(samples: list[float], call: Any, *arguments: Any) -> None:
    start = time.perf_counter()
    call(*arguments)
    samples.append(time.perf_counter() - start)


def _check(session: SwitchableSession, serving: Serving, inputs: dict[str, np.ndarray], owners: list[str]) -> None:
    answers = []
    for version in serving.customers.values():
        session.load("acme", version)
        answers.append(session.predict(inputs, owners)[0])
    if np.abs(answers[0] - answers[1]).max() < 1e-4:
        raise SystemExit("the two versions answer alike, so a swap could not be seen")


def _run_beside_swaps(
    session: SwitchableSession,
    serving: Serving,
    inputs: dict[str, np.ndarray],
    owners: list[str],
    arguments: argparse.Namespace,
) -> tuple[list[float], float]:
    stop, done = threading.Event(), 0
    versions = list(serving.customers.values())

    def swap() -> None:
        nonlocal done
        while not stop.wait(1 / arguments.swaps_per_second):
            session.load("acme", versions[done % 2])
            done += 1

    thread = threading.Thread(target=swap)
    samples: list[float] = []
    start = time.perf_counter()
    thread.start()
    for _ in range(arguments.runs):
        _time(samples, session.predict, inputs, owners)
    elapsed = time.perf_counter() - start
    stop.set()
    thread.join()
    return samples, done / elapsed


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--cuda-graph", action="store_true", help="the graph captured, in one bucket")
    parser.add_argument("--model", choices=["tiny", "minilm", "roberta-base"], default="minilm")
    parser.add_argument("--rank", type=int, help="fixed rank instead of tau 0.5")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--swaps-per-second", type=float, default=1000.0)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, Path(folder))
    for name, figures in record["latency_us"].items():
        print(f"{name:20} p50 {figures['p50']:10.1f} us  p99 {figures['p99']:10.1f} us  ({figures['samples']})")
    print(f"{record['swaps_per_second']:.0f} swaps a second beside the runs")
    if arguments.output:
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
