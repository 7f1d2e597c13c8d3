"""A batch in which every row is another customer: our graph, a merged graph, PEFT, one session per customer.

    python -m benchmarks.mixed_batch --shape 8x64 -o benchmarks/results/mixed_batch_cpu.json
    python -m benchmarks.mixed_batch --provider cuda --cuda-graph --precision fp16 --model roberta-base --rank 160 \
        --shape 8x128 --shape 64x128 -o FILE

All in one process, in a random order each round; medians and ratios of medians. Inputs and logits go
through host memory in each of them. PEFT gets LoRA of rank 8 on the same layers, which is less
arithmetic than ours, and the same precision. Before anything is timed, the rows of the mixed batch
are compared with runs of their own, and the first customer's with the merged graph.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.common.measuring import environment, in_turn, summary
from benchmarks.common.serving import Serving, make_inputs, prepare
from qrlora_deploy.io.files import write_json
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.runtime import Buckets, SwitchableSession, open_session
from qrlora_deploy.runtime.sessions.runners import make_runner, open_graph
from qrlora_deploy.runtime.sessions.running import Runner

Run = Callable[[], Any]

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""Between a row of a batch and the same row alone: sums in another order."""


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build, check, time; returns the record that is written."""
    rule = FixedRank(arguments.rank) if arguments.rank else EnergyShare(0.5)
    most = max(batch for batch, _length in arguments.shapes)
    serving = prepare(folder, arguments.model, most, rule, arguments.provider, arguments.precision)
    return {
        "model": arguments.model,
        "total_rank": serving.basis.total_rank,
        "ranks": list(serving.basis.ranks.values()),
        "provider": arguments.provider,
        "precision": arguments.precision,
        "cuda_graph": arguments.cuda_graph,
        "shapes": [_measure_shape(serving, arguments, *shape) for shape in arguments.shapes],
        "environment": environment(arguments.provider),
    }


def _measure_shape(serving: Serving, arguments: argparse.Namespace, batch: int, length: int) -> dict[str, Any]:
    runs, error = _runs(serving, arguments, batch, length)
    for name in runs:
        for _ in range(arguments.warmup):
            runs[name]()
    samples = in_turn(runs, np.random.default_rng(2), lambda count: count < arguments.runs)
    latency = {name: summary(values) for name, values in samples.items()}
    median = {name: figures["p50"] for name, figures in latency.items()}
    return {
        "batch": batch,
        "length": length,
        "max_abs_error": error,
        "latency_ms": latency,
        "ratio_to_merged": {name: value / median["merged"] for name, value in median.items()},
        "peft_over_mixed": median["peft mixed"] / median["switchable, all different"],
    }


def _runs(serving: Serving, arguments: argparse.Namespace, batch: int, length: int) -> tuple[dict[str, Run], float]:
    inputs = make_inputs(serving.merged, batch, length)
    customers = dict(list(serving.customers.items())[:batch])
    names = list(customers)
    buckets = Buckets((1, batch), (length,)) if arguments.cuda_graph else None
    opened = open_graph(serving.merged, arguments.provider, cuda_graph=arguments.cuda_graph)
    merged = make_runner(opened, serving.merged, arguments.provider, buckets)
    session = SwitchableSession(serving.switchable, arguments.provider, rows=batch + 2, buckets=buckets)
    for name, customer in customers.items():
        session.load(name, customer)
    error = _check(session, merged, inputs, names, TOLERANCES[arguments.precision])
    each = [open_session(serving.merged.model, arguments.provider) for _ in names] if arguments.sessions else []
    rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(batch)]
    runs: dict[str, Run] = {
        "merged": lambda: merged.run(inputs),
        "switchable, one customer": lambda: session.predict(inputs, [names[0]] * len(names)),
        "switchable, all different": lambda: session.predict(inputs, names),
        "peft mixed": _peft(serving, names, inputs, arguments),
    }
    if each:
        # All of the same bundle, as their speed does not depend on its numbers.
        runs["one session per customer"] = lambda: [
            one.run(["logits"], row) for one, row in zip(each, rows, strict=True)
        ]
    return runs, error


def _check(
    session: SwitchableSession, merged: Runner, inputs: dict[str, np.ndarray], names: list[str], tolerance: float
) -> float:
    mixed = session.predict(inputs, names)[0]
    alone = np.concatenate(
        [session.predict({k: v[i : i + 1] for k, v in inputs.items()}, [n])[0] for i, n in enumerate(names)]
    )
    first = merged.run(inputs)[0]
    error = float(max(np.abs(mixed - alone).max(), np.abs(mixed[0] - first).max()))
    effect = float(np.abs(mixed - session.predict(inputs, [None] * len(names))[0]).max())
    if not error < min(tolerance, effect / 10):
        raise SystemExit(f"the graphs do not agree (error {error:.1e}, effect of the customers {effect:.1e})")
    return error


def _peft(serving: Serving, names: list[str], inputs: dict[str, np.ndarray], arguments: argparse.Namespace) -> Run:
    device = "cuda" if arguments.provider == "cuda" else "cpu"
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[arguments.precision]
    targets = list(serving.basis.ranks)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False)
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


def _shape(text: str) -> tuple[int, int]:
    batch, length = text.split("x")
    return int(batch), int(length)


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--cuda-graph", action="store_true", help="our graphs captured, in one bucket")
    parser.add_argument("--model", choices=["minilm", "roberta-base"], default="minilm")
    parser.add_argument("--rank", type=int, help="fixed rank instead of tau 0.5")
    parser.add_argument("--shape", dest="shapes", type=_shape, action="append", help="BATCHxLENGTH; repeatable")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument(
        "--no-sessions", dest="sessions", action="store_false", help="leave out one session per customer"
    )
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or [(8, 64)]
    onnxruntime.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, Path(folder))
    for shape in record["shapes"]:
        print(f"{shape['batch']} x {shape['length']}, largest difference {shape['max_abs_error']:.1e}")
        for name, figures in shape["latency_ms"].items():
            print(f"  {name:28} p50 {figures['p50']:9.3f} ms  x{shape['ratio_to_merged'][name]:.3f} of merged")
        print(f"  PEFT's mixed batch takes {shape['peft_over_mixed']:.1f} times as long as ours")
    if arguments.output:
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
