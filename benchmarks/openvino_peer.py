"""A padding-free merged bundle beside OpenVINO on the padded one: uneven lengths, fp32, one thread, CPU time in turns.

    python -m benchmarks.openvino_peer quickstart -o benchmarks/results/openvino_peer_cpu.json

The folder is one that `qrlora-deploy quickstart` left. Needs the package openvino. Answers are compared before anything
is timed. CPU time of one thread is hardly changed by other programs.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measuring import environment, summary
from benchmarks.gpu_graph.shapes import make_inputs
from exporters.onnx import export_merged
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import read_basis
from qrlora_deploy.formats.customer_files import read_customer
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.runtime import open_bundle
from qrlora_deploy.runtime.sessions.runners import make_runner, open_graph

SHAPES = ((1, 16), (8, 64), (8, 128))
BOUND = 1e-3

Inputs = dict[str, np.ndarray]


def export(folder: Path, customer: str, output: Path) -> None:
    """Both merged bundles of one customer, where they are not there yet."""
    checkpoint, basis = open_checkpoint(str(folder / "base")), read_basis(folder / "basis.safetensors")
    for name, padding_free in (("padded", False), ("padding-free", True)):
        if not (output / name).exists():
            job = ExportJob(checkpoint, basis, output / name, read_customer(folder, customer))
            export_merged(job, OnnxOptions(padding_free=padding_free))


def subjects(bundles: Path) -> dict[str, Callable[[Inputs], np.ndarray]]:
    """What takes turns, by name: gives logits."""
    openvino = import_module("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(bundles / "padded" / "model.onnx", "CPU", settings)

    def by_openvino(inputs: Inputs) -> np.ndarray:
        return np.asarray(compiled(inputs)[0])

    def ours(name: str) -> Callable[[Inputs], np.ndarray]:
        bundle = open_bundle(bundles / name)
        return make_runner(open_graph(bundle, threads=1), bundle, "cpu", None).run

    return {"OpenVINO, merged, padded": by_openvino} | {
        f"ONNX Runtime, merged, {name}": ours(name) for name in ("padded", "padding-free")
    }


def measure(bundles: Path, runs: int) -> dict[str, Any]:
    """Check and time every shape."""
    made, shapes = subjects(bundles), {}
    reference = next(iter(made))
    for rows, length in SHAPES:
        inputs = make_inputs("minilm", rows, length)
        answers = {name: run(inputs) for name, run in made.items()}
        far = max(float(np.abs(found - answers[reference]).max()) for found in answers.values())
        if far > BOUND * max(1.0, float(np.abs(answers[reference]).max())):
            raise SystemExit(f"{rows}x{length}: logits differ by {far:.2g}")
        samples = {name: np.empty(runs) for name in made}
        for turn in range(runs):
            for name, run in made.items():
                start = time.process_time()
                run(inputs)
                samples[name][turn] = time.process_time() - start
        ratios = {name: float(np.median(taken / samples[reference])) for name, taken in samples.items()}
        shapes[f"{rows}x{length}"] = {
            "kept": float(inputs["attention_mask"].mean()),
            "cpu_ms": {name: summary(list(taken)) for name, taken in samples.items()},
            "by_openvino": ratios,
        }
        print(f"{rows}x{length}", {name: round(ratio, 3) for name, ratio in ratios.items()})
    return {"shapes": shapes, "openvino": version("openvino"), "environment": environment("cpu")}


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--customer", default="banking")
    parser.add_argument("--bundles", type=Path, help="folder to keep the bundles in")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bundles = arguments.bundles or Path(place)
        export(arguments.folder, arguments.customer, bundles)
        record = measure(bundles, arguments.runs)
    if arguments.output:
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
