"""How long `export` takes, by the whole command, beside another checkout of the project.

    python -m benchmarks.export_speed --against CHECKOUT -o benchmarks/results/export_speed.json

A base of MPNet-base's shape with random weights is exported in turn by this checkout and the other one, each in a
process of its own, merged and switchable. The record says whether both write the same graph with the same weights.
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from benchmarks.common.measuring import environment
from benchmarks.fleet.shards import Shards, save_shape
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.sample import sample_texts
from qrlora_deploy.formats.basis import read_basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]
LAST_LAYERS = 4
KINDS = {"switchable": (), "merged": ("--merge", "--coefficients", "acme.safetensors")}


def prepare(folder: Path, shape: str, checkout: Path) -> None:
    """A base, its basis and a customer; the basis by another checkout, which may not read today's format."""
    texts = sample_texts()
    rows = Examples(texts, None, [f"label {index % 4}" for index in range(len(texts))], "sample")
    save_shape(folder / "base", shape, Shards({"sample": rows}, ("label 0", "label 1", "label 2", "label 3")))
    checkpoint = open_checkpoint(str(folder / "base"))
    layers = ("--target", "q" if shape == "mpnet" else "query", "--last-layers", str(LAST_LAYERS))
    run_command(checkout, folder, "factorize", "base", *layers, "-o", "basis.safetensors")
    basis = read_basis(folder / "basis.safetensors")
    values = np.random.default_rng(0).uniform(0.5, 1.5, basis.total_rank).astype(np.float32)
    customer = Coefficients(values, basis.digest, "base", checkpoint.digest, checkpoint.task, checkpoint.labels)
    write_coefficients(customer, folder / "acme.safetensors")


def checkouts_of(against: Path | None) -> dict[str, Path]:
    """This checkout, and the other one where there is one."""
    return {"this": ROOT} | ({} if against is None else {"other": against.resolve()})


def variables_of(checkout: Path) -> dict[str, str]:
    """The environment of a process that imports the project from a checkout."""
    return os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def run_command(checkout: Path, folder: Path, *words: str) -> float:
    """Seconds of a command of a checkout."""
    command = [sys.executable, "-m", "qrlora_deploy.cli", *words]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=variables_of(checkout), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def export(folder: Path, checkout: Path, kind: str, name: str) -> tuple[float, str]:
    """Seconds of the command, and the digest of the graph with its weights."""
    words = ("base", "--basis", "basis.safetensors", *KINDS[kind])
    seconds = run_command(checkout, folder, "export", *words, "-o", name)
    return seconds, digest_of(folder / name / "model.onnx")


def digest_of(file: Path) -> str:
    """Of a graph's operators in their order, what each reads, and the weights; not of names inside of it."""
    graph, places, digest = onnx_ir.load(file).graph, dict[str, int](), hashlib.sha256()

    def of_value(value: Any) -> Any:
        if value is None or value in graph.inputs:
            return value and value.name
        if value.const_value is not None:
            return hashlib.sha256(value.const_value.tobytes()).hexdigest()
        return places.setdefault(value.name, len(places))

    for node in graph:
        read, written = [of_value(value) for value in node.inputs], [of_value(value) for value in node.outputs]
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        digest.update(repr((node.op_type, read, written, attributes)).encode())
    return digest.hexdigest()


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export in turn; returns the record."""
    checkouts = checkouts_of(arguments.against)
    prepare(folder, arguments.shape, checkouts["other"])
    record: dict[str, Any] = {"shape": arguments.shape, "last_layers": LAST_LAYERS, "against": arguments.name}
    for kind in KINDS:
        seconds: dict[str, list[float]] = {name: [] for name in checkouts}
        digests: set[str] = set()
        for turn in range(arguments.rounds):
            for name, checkout in checkouts.items() if turn % 2 else reversed(checkouts.items()):
                taken, digest = export(folder, checkout, kind, f"{kind}-{name}-{turn}")
                seconds[name].append(taken)
                digests.add(digest)
                print(f"{kind}, {name}: {taken:.1f} s", flush=True)
        ratios = [other / own for own, other in zip(seconds["this"], seconds["other"], strict=True)]
        record[kind] = {"seconds": seconds, "times_faster": statistics.median(ratios), "same_graph": len(digests) == 1}
    return record | {"environment": environment("cpu")}


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, required=True, help="another checkout of the project")
    parser.add_argument("--name", default="", help="what that one is, such as its commit; goes into the record")
    parser.add_argument("--shape", default="mpnet", choices=["mpnet", "minilm"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, Path(folder))
    write_json(arguments.output, record)
    print({kind: (record[kind]["times_faster"], record[kind]["same_graph"]) for kind in KINDS})


if __name__ == "__main__":
    main()
