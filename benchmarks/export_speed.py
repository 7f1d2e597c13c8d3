"""How long `export` takes, by the whole command, beside another checkout of the project.

    python -m benchmarks.export_speed --against CHECKOUT -o benchmarks/results/export_speed.json

A base of MPNet-base's shape with random weights is exported in turn by this checkout and the other one, each in a
process of its own, merged and switchable. Both must write the same graph with the same weights.
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

from benchmarks.common.measuring import environment
from benchmarks.fleet.shards import Shards, save_shape
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.sample import sample_texts
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import write_basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare

ROOT = Path(__file__).parents[1]
LAST_LAYERS = 4
KINDS = {"switchable": (), "merged": ("--merge", "--coefficients", "acme.safetensors")}


def prepare(folder: Path, shape: str) -> None:
    """A base, its basis and a customer."""
    texts = sample_texts()
    rows = Examples(texts, None, [f"label {index % 4}" for index in range(len(texts))], "sample")
    save_shape(folder / "base", shape, Shards({"sample": rows}, ("label 0", "label 1", "label 2", "label 3")))
    checkpoint = open_checkpoint(str(folder / "base"))
    targets = choose_targets(checkpoint.skeleton(), ["q" if shape == "mpnet" else "query"], LAST_LAYERS)
    basis = factorize(checkpoint, targets, EnergyShare(0.5))
    write_basis(basis, folder / "basis.safetensors")
    values = np.random.default_rng(0).uniform(0.5, 1.5, basis.total_rank).astype(np.float32)
    customer = Coefficients(values, basis.digest, "base", checkpoint.digest, checkpoint.task, checkpoint.labels)
    write_coefficients(customer, folder / "acme.safetensors")


def export(folder: Path, checkout: Path, kind: str, name: str) -> tuple[float, str]:
    """Seconds of the command, and the digest of the graph with its weights."""
    output = folder / name
    command = [sys.executable, "-m", "qrlora_deploy.cli", "export", "base", "--basis", "basis.safetensors"]
    variables = os.environ | {"PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    subprocess.run([*command, *KINDS[kind], "-o", output], cwd=folder, env=variables, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    digest = hashlib.sha256()
    for file in ("model.onnx", "model.onnx.data"):
        digest.update((output / file).read_bytes())
    return seconds, digest.hexdigest()


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export in turn; returns the record."""
    prepare(folder, arguments.shape)
    checkouts = {"this": ROOT, "other": arguments.against.resolve()}
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
