"""A batch in which every row is another customer: our graph, a merged graph, PEFT, one session per customer.

    python -m benchmarks.mixed_batch --provider cpu --batch 8 --length 64 -o benchmarks/results/mixed_batch_cpu.json
    python -m benchmarks.mixed_batch --provider cuda --cuda-graph --precision fp16 --model roberta-base --rank 160 \
        --batch 64 --length 128 -o FILE

All in one process, in a random order each round; medians and ratios of medians. Inputs and logits go
through host memory in each of them. PEFT gets LoRA of rank 8 on the same layers, which is less
arithmetic than ours, and the same precision. Before anything is timed, the rows of the mixed batch
are compared with runs of their own, and the first customer's with the merged graph.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.serving import Serving, environment, make_inputs, prepare, summary
from qrlora_deploy.files import write_json
from qrlora_deploy.rank_rule import RankRule
from qrlora_deploy.runtime import Buckets, SwitchableSession, open_session
from qrlora_deploy.runtime.bucket_runner import make_runner
from qrlora_deploy.runtime.running import Runner

Run = Callable[[], Any]

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""Between a row of a batch and the same row alone: sums in another order."""


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build, check, time; returns the record that is written."""
    rule = RankRule(tau=None, rank=arguments.rank) if arguments.rank else RankRule(tau=0.5)
    serving = prepare(folder, arguments.model, arguments.batch, rule, arguments.provider, arguments.precision)
    runs, error = _runs(serving, arguments)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs:
        for _ in range(arguments.warmup):
            runs[name]()
    random = np.random.default_rng(2)
    for _ in range(arguments.runs):
        for name in random.permutation(list(runs)):
            # Threads of the one before may still spin and its data fill the caches: the second run counts.
            runs[name]()
            start = time.perf_counter()
            runs[name]()
            samples[name].append(time.perf_counter() - start)
    median = {name: float(np.median(values)) for name, values in samples.items()}
    return {
        "model": arguments.model,
        "total_rank": serving.basis.total_rank,
        "ranks": list(serving.basis.ranks.values()),
        "batch": arguments.batch,
        "length": arguments.length,
        "provider": arguments.provider,
        "precision": arguments.precision,
        "cuda_graph": arguments.cuda_graph,
        "max_abs_error": error,
        "latency_ms": {name: summary(values) for name, values in samples.items()},
        "ratio_to_merged": {name: value / median["merged"] for name, value in median.items()},
        "peft_over_mixed": median["peft mixed"] / median["switchable, all different"],
        "environment": environment(arguments.provider),
    }


def _runs(serving: Serving, arguments: argparse.Namespace) -> tuple[dict[str, Run], float]:
    inputs = make_inputs(serving.merged, arguments.batch, arguments.length)
    names = list(serving.customers)
    buckets = Buckets((1, arguments.batch), (arguments.length,)) if arguments.cuda_graph else None
    opened = open_session(serving.merged.model, arguments.provider, cuda_graph=arguments.cuda_graph)
    merged = make_runner(opened, serving.merged.manifest, arguments.provider, buckets)
    session = SwitchableSession(serving.switchable, arguments.provider, rows=arguments.batch + 2, buckets=buckets)
    for name, customer in serving.customers.items():
        session.load(name, customer)
    error = _check(session, merged, inputs, names, TOLERANCES[arguments.precision])
    each = _sessions(serving, arguments)
    rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(arguments.batch)]
    runs: dict[str, Run] = {
        "merged": lambda: merged.run(inputs),
        "switchable, one customer": lambda: session.run(inputs, [names[0]] * len(names)),
        "switchable, all different": lambda: session.run(inputs, names),
        "peft mixed": _peft(serving, inputs, arguments),
    }
    if each:
        runs["one session per customer"] = lambda: [
            one.run(["logits"], row) for one, row in zip(each, rows, strict=True)
        ]
    return runs, error


def _check(
    session: SwitchableSession, merged: Runner, inputs: dict[str, np.ndarray], names: list[str], tolerance: float
) -> float:
    mixed = session.run(inputs, names)[0]
    alone = np.concatenate(
        [session.run({k: v[i : i + 1] for k, v in inputs.items()}, [n])[0] for i, n in enumerate(names)]
    )
    first = merged.run(inputs)[0]
    error = float(max(np.abs(mixed - alone).max(), np.abs(mixed[0] - first).max()))
    effect = float(np.abs(mixed - session.run(inputs, [None] * len(names))[0]).max())
    if not error < min(tolerance, effect / 10):
        raise SystemExit(f"the graphs do not agree (error {error:.1e}, effect of the customers {effect:.1e})")
    return error


def _sessions(serving: Serving, arguments: argparse.Namespace) -> list[Any]:
    """A session for each row; all of the same merged bundle, as their speed does not depend on its numbers."""
    if not arguments.sessions:
        return []
    return [open_session(serving.merged.model, arguments.provider) for _ in range(arguments.batch)]


def _peft(serving: Serving, inputs: dict[str, np.ndarray], arguments: argparse.Namespace) -> Run:
    device = "cuda" if arguments.provider == "cuda" else "cpu"
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[arguments.precision]
    targets = list(serving.basis.ranks)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    names = list(serving.customers)
    model = get_peft_model(serving.checkpoint.load_model(), config, adapter_name=names[0].replace("-", "_"))
    adapters = [name.replace("-", "_") for name in names]
    for adapter in adapters[1:]:
        model.add_adapter(adapter, config)
    model.eval().to(device, dtype)

    def run() -> np.ndarray:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
            logits: np.ndarray = model(**tensors, adapter_names=adapters).logits.float().cpu().numpy()
        return logits

    return run


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--cuda-graph", action="store_true", help="our graphs captured, in one bucket")
    parser.add_argument("--model", choices=["minilm", "roberta-base"], default="minilm")
    parser.add_argument("--rank", type=int, help="fixed rank instead of tau 0.5")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument(
        "--no-sessions", dest="sessions", action="store_false", help="leave out one session per customer"
    )
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    onnxruntime.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, Path(folder))
    for name, figures in record["latency_ms"].items():
        print(f"{name:28} p50 {figures['p50']:9.3f} ms  x{record['ratio_to_merged'][name]:.3f} of merged")
    print(f"PEFT's mixed batch takes {record['peft_over_mixed']:.1f} times as long as ours")
    if arguments.output:
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
