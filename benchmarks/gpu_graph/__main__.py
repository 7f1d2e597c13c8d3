"""Graphs of one model against torch.compile and against each other, on batches with uneven lengths.

    python -m benchmarks.gpu_graph --device cuda --shape roberta --out FILE
    python -m benchmarks.gpu_graph --device cuda --shape roberta --group switchable --no-compile --out FILE
    python -m benchmarks.gpu_graph --device cpu --shape minilm --batches 1x16 8x64

Every graph is exported from the same random weights, by the exporter's own code, and its logits are
compared with PyTorch's before anything is timed (docs/padding_free.md says what each graph is). All
contenders of a batch run in a random order in each round; figures are medians and ratios of medians,
once with inputs and logits on the device and once from numpy to numpy, which is where a padding-free
graph pays for finding its tokens. A graph that does not run is reported and left out.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch

from benchmarks.common.measuring import environment, in_turn, summary
from benchmarks.gpu_graph.exporting import OPTIMIZER, export_all
from benchmarks.gpu_graph.packed_torch import PACKED_COMPILED, PACKED_EAGER, PackedMpnet, packed_contender, packed_model
from benchmarks.gpu_graph.running import Contender, Graph, torch_contender
from benchmarks.gpu_graph.shapes import SIZES, Inputs, make_inputs, make_model
from benchmarks.gpu_graph.variants import ALL, GROUPS, Variant
from qrlora_deploy.io.files import write_json

BATCHES = ((1, 128), (8, 128), (64, 128), (64, 384))
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2}
"""Of logits against PyTorch in the same precision, by max(1, max |logit|): those of the exporter's parity
check, for fp16 twice, as both sides are rounded. A wrong mask is off by about the logits themselves."""

COMPILED, EAGER = "torch.compile", "torch eager"
GUARD_RUNS = 3
"""Runs before the first figure: torch.compile warms up and captures, ONNX Runtime captures."""


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export, check, time; returns the record that is written."""
    started = time.perf_counter()
    graphs = export_all(arguments, folder)
    peer = make_model(arguments.shape).to(
        arguments.device, torch.float16 if arguments.precision == "fp16" else torch.float32
    )
    print(f"{len(graphs)} graphs after {time.perf_counter() - started:.0f} s", flush=True)
    merge_ms = {name: graph.merge_ms(arguments.device, arguments.threads) for name, graph in graphs.items()}
    record: dict[str, Any] = {
        "shape": arguments.shape,
        "precision": arguments.precision,
        "device": arguments.device,
        "threads": arguments.threads,
        "environment": environment("cuda" if arguments.device == "cuda" else "cpu"),
        "merge_ms": {name: taken for name, taken in merge_ms.items() if taken is not None},
    }
    found: list[dict[str, Any]] = []
    for batch, length in arguments.batches:
        found.append(_measure_batch(arguments, graphs, peer, make_inputs(arguments.shape, batch, length)))
        _show(found[-1])
        print(f"({time.perf_counter() - started:.0f} s)", flush=True)
        record |= {"batches": found, "geometric_means": geometric_means(found)}
        if arguments.out:
            # After each batch: what was measured is not lost if the next one does not end.
            write_json(arguments.out, record)
    return record


def _measure_batch(
    arguments: argparse.Namespace, graphs: dict[str, Graph], peer: Any, inputs: Inputs
) -> dict[str, Any]:
    batch, length = inputs["attention_mask"].shape
    contenders = [torch_contender(EAGER, peer, inputs, arguments.device, compiled=False)]
    expected = contenders[0].whole()
    if arguments.compile:
        # Each shape is compiled on its own, as it would be for a service of fixed shapes.
        torch._dynamo.reset()
        contenders.append(torch_contender(COMPILED, peer, inputs, arguments.device, compiled=True))
    if arguments.packed_torch:
        _add_packed(arguments, contenders, inputs, expected)
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    effects: dict[str, float] = {}
    answers: dict[str, np.ndarray] = {}
    for name, graph in graphs.items():
        try:
            contender = graph.bind(inputs, arguments.device, arguments.threads).contender(name)
            for _ in range(GUARD_RUNS):
                answers[name] = contender.whole()
            contenders.append(contender)
        except Exception as error:  # as above
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
    bound = TOLERANCES[arguments.precision] * max(1.0, float(np.abs(expected).max()))
    for name, answer in answers.items():
        if graphs[name].table is None:
            reference = expected
        else:
            # Against the padded graph with the same customers, whose effect is recorded; the exporter's own
            # tests hold it against PyTorch.
            reference = answers[
                next(other for other in answers if other in ALL and _same_customers(ALL[other], ALL[name]))
            ]
            effects[name] = float(np.abs(answer - expected).max())
        errors[name] = float(np.abs(answer - reference).max())
        if not errors[name] <= bound:
            failed[name] = f"logits are {errors[name]:.1e} off, more than {bound:.1e}"
    contenders = [one for one in contenders if one.name not in failed]
    for one in contenders:
        for _ in range(GUARD_RUNS):
            one.whole()
            one.device()
    device_s = _rounds({one.name: one.device for one in contenders}, arguments)
    whole_s = _rounds({one.name: one.whole for one in contenders}, arguments)
    result = {
        "batch": batch,
        "length": length,
        "kept_share": float(inputs["attention_mask"].mean()),
        "tokens": {one.name: one.tokens for one in contenders},
        "max_abs_error": errors,
        "customers_effect": effects,
        "failed": failed,
        "device_ms": {name: summary(values) for name, values in device_s.items()},
        "whole_ms": {name: summary(values) for name, values in whole_s.items()},
    }
    del contenders
    gc.collect()
    return result


def _same_customers(one: Variant, other: Variant) -> bool:
    return (one.setup, one.one_customer) == (other.setup, other.one_customer)


def _add_packed(
    arguments: argparse.Namespace, contenders: list[Contender], inputs: Inputs, expected: np.ndarray
) -> None:
    """PyTorch on packed tokens, where it agrees with the padded batch; what does not run is said and left out."""
    model = make_model(arguments.shape).to(
        arguments.device, torch.float16 if arguments.precision == "fp16" else torch.float32
    )
    peer, bound = packed_model(model), TOLERANCES[arguments.precision] * max(1.0, float(np.abs(expected).max()))
    for name, compiled in ((PACKED_EAGER, False), (PACKED_COMPILED, True)):
        # Without a compiler `flex_attention` writes all scores of all rows, and what the bias is made of.
        if compiled and not arguments.compile or not compiled and isinstance(peer, PackedMpnet):
            continue
        try:
            contender = packed_contender(name, peer, inputs, arguments.device, compiled)
            error = max(float(np.abs(contender.whole() - expected).max()) for _ in range(GUARD_RUNS))
        except Exception as problem:  # a peer that does not run must not cost the others
            print(f"{name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
            continue
        if error <= bound:
            contenders.append(contender)
        else:
            print(f"{name}: logits are {error:.1e} off, more than {bound:.1e}", flush=True)


def _rounds(runs: dict[str, Callable[[], Any]], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every run: rounds until the time is spent, and never less than `--least-runs`."""
    end = time.perf_counter() + arguments.seconds
    return in_turn(
        runs, np.random.default_rng(4), lambda count: time.perf_counter() < end or count < arguments.least_runs
    )


def _medians(batch: dict[str, Any], column: str) -> dict[str, float]:
    return {name: figures["p50"] for name, figures in batch[column].items()}


def geometric_means(batches: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios to torch.compile and to the padded and padding-free merged graph, over the batches that both ran in."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    for column in ("device_ms", "whole_ms"):
        medians = [_medians(batch, column) for batch in batches]
        means[column] = {}
        for reference in (COMPILED, PACKED_COMPILED, OPTIMIZER, "padded", "padding-free", "padding-free, varlen"):
            ratios = {
                name: [found[name] / found[reference] for found in medians if name in found and reference in found]
                for name in sorted({name for found in medians for name in found})
            }
            means[column][reference] = {
                name: geometric_mean(values) for name, values in ratios.items() if len(values) == len(medians)
            }
    return means


def _show(batch: dict[str, Any]) -> None:
    print(f"{batch['batch']} x {batch['length']}, {batch['kept_share']:.2f} of it text")
    device, whole = _medians(batch, "device_ms"), _medians(batch, "whole_ms")
    peer = device.get(COMPILED, device[EAGER])
    for name, value in device.items():
        error = f"error {batch['max_abs_error'][name]:.0e}" if name in batch["max_abs_error"] else ""
        print(
            f"  {name:34} {value:9.3f} ms  x{value / peer:.3f}   host to host {whole[name]:9.3f} ms   "
            f"{batch['tokens'][name]:6d} tokens  {error}"
        )
    for name, reason in batch["failed"].items():
        print(f"  {name:34} LEFT OUT: {reason}")


def _batch(text: str) -> tuple[int, int]:
    batch, length = text.split("x")
    return int(batch), int(length)


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SIZES), default="tiny")
    parser.add_argument("--precision", choices=["fp32", "fp16"], help="default: fp16 on cuda, fp32 on cpu")
    parser.add_argument("--batches", type=_batch, nargs="+", help="BATCHxLENGTH")
    parser.add_argument("--group", choices=list(GROUPS), default="merged", help="of graphs")
    parser.add_argument("--variants", nargs="+", choices=list(ALL), metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each column of each batch")
    parser.add_argument("--threads", type=int, help="within an operator, of the graphs and of PyTorch")
    parser.add_argument("--least-runs", type=int, default=15)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 3), help="that export")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--packed-torch", action="store_true", help="PyTorch on packed tokens too")
    parser.add_argument("--quick", action="store_true", help="two small batches, few runs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or ("fp16" if arguments.device == "cuda" else "fp32")
    arguments.batches = arguments.batches or (((1, 16), (4, 32)) if arguments.quick else BATCHES)
    if arguments.quick:
        arguments.seconds, arguments.least_runs = 0.2, 5
    chosen = arguments.variants or [variant.name for variant in GROUPS[arguments.group]]
    arguments.variants = [name for name in chosen if arguments.device == "cuda" or not ALL[name].cuda_only]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, Path(folder))
    for column, references in record["geometric_means"].items():
        for reference, ratios in references.items():
            for name, ratio in ratios.items():
                print(f"{column:9} {name:34} / {reference:24} {ratio:.3f}")


if __name__ == "__main__":
    main()
