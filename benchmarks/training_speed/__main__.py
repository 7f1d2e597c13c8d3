"""Steps per second of one customer's training, beside LoRA of PEFT on the same layers, batches and precision.

    python -m benchmarks.training_speed --data FILE.tsv --out benchmarks/results/training_speed_cpu.json
    python -m benchmarks.training_speed --device cuda --rounds 4 --steps 60 --out FILE.json

The query projections of the last 4 layers. Without --data, texts that come with the project; without
--model, random weights of the shape. Every subject sees the same rows in the same order, without
dropout, in bf16 on a GPU and fp32 on a CPU; rounds are interleaved. Exits with 1 where the cached
run's losses or coefficients differ from the uncached one's.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from benchmarks.common.layers import LAST_LAYERS
from benchmarks.common.measuring import environment
from benchmarks.training_speed.setup import Setup, prepare, token_figures
from benchmarks.training_speed.subjects import SUBJECTS, Clock, ours
from qrlora_deploy.data.sample import general_file
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.adapter import QRLoRALinear, get_coefficients

CHECKED_STEPS = 12
TOLERANCES = {"cpu": 1e-4, "cuda": 5e-2}
"""Losses and coefficients, cached against uncached: fp32 sums in another order; roundings to bf16 in another order."""


def measure(setup: Setup, rounds: int) -> dict[str, Any]:
    """Milliseconds a step of every subject: the median over interleaved rounds.

    On a GPU after one round that is not counted, in which graphs are captured.
    """
    start = time.perf_counter()
    made, prepare_s = {}, {}
    for name, make in SUBJECTS.items():
        made[name] = make(setup)
        prepare_s[name], start = time.perf_counter() - start, time.perf_counter()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    uncounted = 1 if setup.device == "cuda" else 0
    for number in range(rounds + uncounted):
        for name, run in made.items():
            clock = Clock(setup.steps)
            run(clock)
            if number >= uncounted:
                samples[name].append(clock.seconds_per_step())
    found = {}
    for name, pairs in samples.items():
        wall, cpu = (median(column) for column in zip(*pairs, strict=True))
        found[name] = {
            "steps_per_s": 1 / wall,
            "wall_ms": 1e3 * wall,
            "cpu_ms": 1e3 * cpu,
            "rounds_ms": [1e3 * pair[0] for pair in pairs],
            "prepare_s": prepare_s[name],
        }
    return found


def ratios(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times the steps per second of each peer, as the median over rounds, and by CPU time."""
    ours_found = found["ours, cached trunk"]
    result = {}
    for name, other in found.items():
        pairs = zip(other["rounds_ms"], ours_found["rounds_ms"], strict=True)
        by_round = median(theirs / own for theirs, own in pairs)
        result[name] = {"wall": by_round, "cpu": other["cpu_ms"] / ours_found["cpu_ms"]}
    return result


def check(setup: Setup) -> dict[str, Any]:
    """Losses of the first steps and the coefficients after them, cached against uncached."""
    losses, coefficients = [], []
    for cached in (False, True):
        trainer = ours(setup, cached)
        trainer.args.max_steps = CHECKED_STEPS
        losses.append(_losses(trainer))
        coefficients.append(get_coefficients(dict(_adapters(trainer.model))))
    differences = [float(np.abs(np.subtract(*pair)).max()) for pair in (losses, coefficients)]
    bound = TOLERANCES[setup.device]
    size = float(np.abs(coefficients[0]).max())
    return {
        "steps": len(losses[0]),
        "losses": [[round(float(value), 6) for value in part] for part in losses],
        "loss_difference": differences[0],
        "coefficient_difference": differences[1],
        "largest_coefficient": size,
        "tolerance": bound,
        "passed": differences[0] <= bound and differences[1] <= bound * max(1.0, size),
    }


def _adapters(model: Any) -> Iterator[tuple[str, QRLoRALinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QRLoRALinear))


def _losses(trainer: Trainer) -> np.ndarray:
    seen: list[torch.Tensor] = []
    step = trainer.training_step

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        loss = step(*args, **options)
        # A replayed graph writes the next loss into the same place.
        seen.append(loss.clone())
        return loss

    trainer.training_step = noted  # type: ignore[method-assign]
    trainer.train()
    return np.array([float(loss) for loss in seen])


def main() -> int:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="folder of a classifier; instead of --shape")
    parser.add_argument("--shape", choices=["mpnet", "minilm"], default="mpnet")
    parser.add_argument("--data", nargs="+", default=[str(general_file())], help="labelled texts")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "environment": environment(arguments.device) | {"threads": torch.get_num_threads()},
        "shape": arguments.model or arguments.shape,
        "last_layers": LAST_LAYERS,
        "batch_size": arguments.batch_size,
        "max_length": arguments.max_length,
        "precision": "bf16 autocast" if arguments.device == "cuda" else "fp32",
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "data": {},
    }
    for data in arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            setup = prepare(arguments, data, Path(folder))
            record["coefficients"] = setup.basis.total_rank
            found = measure(setup, arguments.rounds)
            gc.collect()
            checked = check(setup)
            result = {"tokens": token_figures(setup), "subjects": found, "times": ratios(found), "check": checked}
        record["data"]["/".join(Path(data).parts[-2:])] = result
        show(data, result)
    if arguments.out:
        write_json(arguments.out, record)
    return 0 if all(result["check"]["passed"] for result in record["data"].values()) else 1


def show(data: str, result: dict[str, Any]) -> None:
    """Print a table."""
    tokens = result["tokens"]
    print(f"{data}: {tokens['mean']:.1f} tokens a row, {100 * tokens['tokens_of_places']:.0f} % of places are tokens")
    for name, one in result["subjects"].items():
        times = result["times"][name]
        print(
            f"  {name:22} {one['steps_per_s']:8.2f} steps/s  {one['wall_ms']:8.2f} ms  CPU {one['cpu_ms']:8.2f} ms  "
            f"ours x{times['wall']:.2f} (CPU time x{times['cpu']:.2f})  prepared in {one['prepare_s']:.1f} s"
        )
    checked = result["check"]
    print(
        f"  cached against uncached, {checked['steps']} steps: losses {checked['loss_difference']:.1e}, "
        f"coefficients {checked['coefficient_difference']:.1e} of {checked['largest_coefficient']:.2f}, "
        f"bound {checked['tolerance']:g}: {'passed' if checked['passed'] else 'FAILED'}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
