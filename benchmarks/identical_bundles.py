"""How often the benchmark claims a difference between identical bundles, and how often it sees a slower one.

    python -m benchmarks.identical_bundles --repeats 20 --seconds 20 -o benchmarks/results/identical_bundles_cpu.json

Each repeat opens a merged bundle twice, and a copy with a branch inserted into its graph, and compares
the three in turn as `bench` does. The branch multiplies activations of one layer by the feed-forward
weights of others and adds the result times zero to the logits: the same answers, later. How much later
is measured in the same repeats.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.common.measuring import environment
from benchmarks.common.serving import prepare
from qrlora_deploy.bench.measurements import difference, measurement_of
from qrlora_deploy.bench.rounds import Bounds, measure_latency
from qrlora_deploy.bench.statistics import PERCENTILES, ratio, ratio_in_rounds
from qrlora_deploy.bench.subjects import BundleSubject, Spec
from qrlora_deploy.bench.workload import Workload
from qrlora_deploy.io.files import digest_file, write_json
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime.bundle.bundle import MANIFEST_FILE, MODEL_FILE

NAMES = ("first", "second", "slower")
CLAIMS = ("less", "more")


def slow_down(bundle: Path, output: Path, branches: int) -> None:
    """Copy a merged bundle, with so many matrix products beside its own."""
    shutil.copytree(bundle, output)
    model = onnx.load(output / MODEL_FILE)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    widest = max(weights[node.input[1]].dims[1] for node in products)
    wide = [node for node in products if weights[node.input[1]].dims[1] == widest]
    zero = numpy_helper.from_array(np.zeros((), np.float32), "late_zero")
    axes = numpy_helper.from_array(np.arange(3), "late_axes")
    graph.initializer.extend([zero, axes])
    late: list[Any] = []
    for index in range(branches):
        # Activations of one layer with weights of another: no product that is there already.
        source, other = wide[index % len(wide)], wide[(index + 1 + index // len(wide)) % len(wide)]
        product, most, nothing = (f"late_{index}_{step}" for step in ("product", "most", "nothing"))
        late += [
            helper.make_node("MatMul", [source.input[0], other.input[1]], [product]),
            helper.make_node("ReduceMax", [product, "late_axes"], [most], keepdims=0),
            helper.make_node("Mul", [most, "late_zero"], [nothing]),
        ]
    _add_to_logits(graph, late, [f"late_{index}_nothing" for index in range(branches)])
    onnx.save(model, output / MODEL_FILE)
    manifest = json.loads((output / MANIFEST_FILE).read_text())
    manifest["files"][MODEL_FILE] = digest_file(output / MODEL_FILE)
    (output / MANIFEST_FILE).write_text(json.dumps(manifest))


def _add_to_logits(graph: Any, late: list[Any], nothings: list[str]) -> None:
    logits = graph.output[0].name
    last = next(node for node in graph.node if logits in node.output)
    last.output[list(last.output).index(logits)] = "early_logits"
    graph.node.extend(late)
    before = "early_logits"
    for index, nothing in enumerate(nothings):
        after = logits if index == len(nothings) - 1 else f"late_{index}_logits"
        graph.node.append(helper.make_node("Add", [before, nothing], [after]))
        before = after


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All repeats; returns the record that is written."""
    serving = prepare(folder, "minilm", 1, EnergyShare(0.5), "cpu")
    normal, slower = serving.merged.folder, folder / "slower"
    slow_down(normal, slower, arguments.branches)
    repeats = []
    for seed in range(arguments.repeats):
        repeats.append(_repeat({"first": normal, "second": normal, "slower": slower}, arguments, seed))
        print(json.dumps(repeats[-1]), flush=True)
    identical = [pair for repeat in repeats for pair in repeat["identical"].values()]
    late = [repeat["slower"]["p50"] for repeat in repeats]
    return {
        "batch": arguments.batch,
        "length": arguments.length,
        "seconds": arguments.seconds,
        "threads": arguments.threads,
        "repeats": repeats,
        "claims_of_identical": {
            name: sum(
                repeat["identical"][name]["difference"] in CLAIMS for repeat in repeats if name in repeat["identical"]
            )
            for name in ("p50", "p99")
        },
        "intervals_without_1": sum(not pair["low"] <= 1 <= pair["high"] for pair in identical),
        "intervals": len(identical),
        "slower_was_seen": sum(pair["difference"] == "more" for pair in late),
        "slower_by": float(np.median([pair["value"] for pair in late])),
        "environment": environment("cpu"),
    }


def _repeat(folders: dict[str, Path], arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    workload = Workload(arguments.batch, arguments.length, seed=seed)
    subjects = {
        name: BundleSubject(Spec(name, "candidate", "bundle", folder, threads=arguments.threads), [workload])
        for name, folder in folders.items()
    }
    calls = {name: subject.prepare(workload) for name, subject in subjects.items()}
    found = measure_latency(calls, Bounds(arguments.seconds, arguments.samples), np.random.default_rng(seed))
    made = {name: measurement_of(name, "single-stream", workload, series) for name, series in found.items()}
    return {
        "samples": len(found["first"].samples),
        "p50_ms": {name: item.percentiles["p50"].value for name, item in made.items()},
        "stable": {name: item.stable for name, item in made.items()},
        "identical": _ratios(made["second"].samples, made["first"].samples, seed),
        "slower": _ratios(made["slower"].samples, made["first"].samples, seed),
    }


def _ratios(samples: list[float], reference: list[float], seed: int) -> dict[str, Any]:
    found = {}
    for name in ("p50", "p99"):
        pair = np.array(samples), np.array(reference)
        estimate = ratio_in_rounds(*pair, seed) if name == "p50" else ratio(*pair, PERCENTILES[name], True, seed)
        if estimate is not None:
            found[name] = asdict(estimate) | {"difference": difference(estimate)}
    return found


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--samples", type=int, default=368)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--threads", type=int, help="within an operator")
    parser.add_argument("--branches", type=int, default=5, help="each is a feed-forward product of one layer")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, Path(folder))
    claims = record["claims_of_identical"]
    print(f"identical: {claims['p50']} claims of the p50 and {claims['p99']} of the p99 in {arguments.repeats} runs")
    print(f"slower by {record['slower_by'] - 1:.1%}: seen in {record['slower_was_seen']} of {arguments.repeats} runs")
    if arguments.output:
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
