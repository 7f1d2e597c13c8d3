"""The runtime and the quickstart beside an earlier checkout of the project, as ratios of times.

    python -m benchmarks.releases --against CHECKOUT --name cac4fe9 -o benchmarks/results/releases.json

The earlier checkout makes a bundle and customers' files; both open the same ones. Each checkout has one process that
stays; they take turns, so that what else the machine does meets both. A sample is the median of a turn's calls; a ratio
is that of two turns that stand beside each other. Answers of both must agree to the bit.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measuring import environment
from benchmarks.export_speed import checkouts_of, prepare, run_command, variables_of
from qrlora_deploy.formats.coefficients import read_coefficients, write_coefficients
from qrlora_deploy.io.files import write_json

CUSTOMERS = 64
BATCH, LENGTH = 64, 64

CHILD = """
import hashlib, json, statistics, sys, time
from pathlib import Path
import numpy as np
from qrlora_deploy.runtime import SwitchableSession, open_bundle

folder, calls, batch, length = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
session = SwitchableSession(open_bundle(folder / "bundle"), threads=int(sys.argv[5]))
files = sorted((folder / "customers").glob("*.safetensors"))
for file in files:
    session.load(file.stem, file)
random = np.random.default_rng(0)
names = [record.name for record in session.manifest.inputs if record.dtype == "int64" and len(record.shape) == 2]
inputs = {name: np.ones((batch, length), np.int64) for name in names}
inputs["input_ids"] = random.integers(5, 200, (batch, length))
inputs |= {name: np.zeros((batch, length), np.int64) for name in names if name == "token_type_ids"}
owners = [files[row % len(files)].stem for row in range(batch)]

def median(call):
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)

turns = {
    "mixed batch": lambda: session.predict(inputs, owners),
    "one row": lambda: session.predict({name: array[:1] for name, array in inputs.items()}, owners[:1]),
    "swap from disk": lambda: session.load("swapped", files[0]),
}
answers = session.predict(inputs, owners)[0]
print(json.dumps({"digest": hashlib.sha256(answers.tobytes()).hexdigest()}), flush=True)
for line in sys.stdin:
    print(json.dumps({"s": median(turns[line.strip()])}), flush=True)
"""
KINDS = ("mixed batch", "one row", "swap from disk")


class Contender:
    """A checkout's process, which answers one line for each line."""

    def __init__(self, checkout: Path, folder: Path, arguments: argparse.Namespace) -> None:
        shape = [str(number) for number in (arguments.calls, BATCH, LENGTH, arguments.threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), *shape],
            env=variables_of(checkout),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.digest = self._read()["digest"]

    def seconds(self, kind: str) -> float:
        """The median of a turn's calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(kind + "\n")
        self._process.stdin.flush()
        found: float = self._read()["s"]
        return found

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def make(folder: Path, checkout: Path, shape: str) -> None:
    """A bundle by the earlier checkout, and customers with coefficients of their own."""
    prepare(folder, shape, checkout)
    run_command(checkout, folder, "export", "base", "--basis", "basis.safetensors", "-o", "bundle")
    (folder / "customers").mkdir()
    acme = read_coefficients(folder / "acme.safetensors")
    for number in range(CUSTOMERS):
        values = np.random.default_rng(number).uniform(0.5, 1.5, len(acme.values)).astype(np.float32)
        customer = type(acme)(values, acme.basis_digest, acme.base_name, acme.base_digest, acme.task, acme.labels)
        write_coefficients(customer, folder / "customers" / f"c{number:03}.safetensors")


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Take turns; returns the record."""
    checkouts = checkouts_of(arguments.against)
    make(folder, checkouts["other"], arguments.shape)
    contenders = {name: Contender(checkout, folder, arguments) for name, checkout in checkouts.items()}
    seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in checkouts} for kind in KINDS}
    for turn in range(arguments.turns):
        for kind in KINDS:
            for name in sorted(contenders, reverse=bool(turn % 2)):
                seconds[kind][name].append(contenders[name].seconds(kind))
    same = len({contender.digest for contender in contenders.values()}) == 1
    for contender in contenders.values():
        contender.close()
    if arguments.quickstarts:
        seconds["quickstart"] = {name: [] for name in checkouts}
        for turn in range(arguments.quickstarts):
            for name in sorted(checkouts, reverse=bool(turn % 2)):
                taken = run_command(checkouts[name], folder, "quickstart", "-o", f"tour-{name}-{turn}")
                seconds["quickstart"][name].append(taken)
                print(f"quickstart, {name}: {taken:.0f} s", flush=True)
    return {
        "against": arguments.name,
        "shape": arguments.shape,
        "batch": [BATCH, LENGTH],
        "customers": CUSTOMERS,
        "calls_a_turn": arguments.calls,
        "same_answers": same,
        "seconds": seconds,
        "time_of_this_by_the_other": {kind: ratio(samples) for kind, samples in seconds.items()},
        "environment": environment("cpu"),
    }


def ratio(samples: dict[str, list[float]]) -> dict[str, float]:
    """The median of the turns' ratios, and the quartiles: what is within them is noise."""
    found = np.array(samples["this"]) / np.array(samples["other"])
    low, high = np.quantile(found, [0.25, 0.75])
    return {"median": statistics.median(found.tolist()), "quartile_1": float(low), "quartile_3": float(high)}


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, required=True, help="an earlier checkout of the project")
    parser.add_argument("--name", default="", help="what that one is, such as its commit; goes into the record")
    parser.add_argument("--shape", default="minilm", choices=["mpnet", "minilm"])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--calls", type=int, default=10, help="of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quickstarts", type=int, default=0, help="runs of each checkout; minutes each")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = compare(arguments, Path(folder))
    write_json(arguments.output, record)
    print(record["time_of_this_by_the_other"], "same answers:", record["same_answers"])


if __name__ == "__main__":
    main()
