"""What `serve` reaches on a GPU: large binary requests beside the session, and one text a request by several processes.

    python -m benchmarks.server.gpu -o benchmarks/results/gpu_h100/server.json

Rounds alternate. `--device cpu --precision fp32` tries it out without a GPU.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.common.measuring import environment
from benchmarks.export_speed import ROOT, prepare, run_command
from benchmarks.server.__main__ import load, pack, port_of, running, serving
from qrlora_deploy.io.files import write_json

ROWS, LENGTH = 64, 128
CUSTOMERS = 1_000
SPREAD = 20.0
"""Of coefficients: an untrained head makes little of them, and answers must differ to be checked."""

BINARY_CONNECTIONS = 4
CLIENTS = 4
"""Processes that ask: one alone cannot ask as often as a GPU answers."""

SESSION = """
import json, sys, time
import numpy as np
from benchmarks.server.load import name_of
from qrlora_deploy.runtime import SwitchableSession, load_packed, open_bundle

bundle, packed, customers, rows, length, device = (*sys.argv[1:3], *map(int, sys.argv[3:6]), sys.argv[6])
session = SwitchableSession(open_bundle(bundle), provider=device)
load_packed(session, packed)
random = np.random.default_rng(0)
batches = []
for _ in range(16):
    ids = random.integers(5, 200, (rows, length))
    owners = [name_of(int(owner)) for owner in random.integers(customers, size=rows)]
    batches.append(({"input_ids": ids, "attention_mask": np.ones_like(ids)}, owners))
print("ready", flush=True)
for line in sys.stdin:
    seconds, calls, start = float(line), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        session.predict(*batches[calls % len(batches)])
        calls += 1
    print(json.dumps({"rows_per_s": rows * calls / (time.perf_counter() - start)}), flush=True)
"""


def binary(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Binary requests of `ROWS` rows of `LENGTH` tokens by what the session alone does."""
    words = (folder / "bundle", folder / f"{CUSTOMERS}.packed", CUSTOMERS, ROWS, LENGTH, options.device)
    sizes = {"rows": ROWS, "length": LENGTH, "customers": CUSTOMERS, "connections": BINARY_CONNECTIONS}
    rates: dict[str, list[float]] = {"session": [], "server": []}
    device = ("--provider", options.device.partition(":")[0])
    with serving(folder, CUSTOMERS, *device) as server, running("-c", SESSION, *map(str, words)) as session:
        load(port_of(server), seconds=3, **sizes)
        for _ in range(options.rounds):
            rates["session"].append(session.ask(str(options.seconds))["rows_per_s"])
            rates["server"].append(load(port_of(server), seconds=options.seconds, **sizes)["rows_per_s"])
    ratios = [served / alone for served, alone in zip(rates["server"], rates["session"], strict=True)]
    return {"rows_per_s": rates, "server_by_session": statistics.median(ratios), "samples": ratios}


def one_text(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rows a second of one text a request, by the number of front processes."""
    found = {}
    device = ("--provider", options.device.partition(":")[0])
    for processes in options.processes:
        with serving(folder, CUSTOMERS, *device, "--processes", str(processes)) as server:
            sizes = {"rows": 1, "customers": CUSTOMERS, "connections": options.connections}
            load(port_of(server), seconds=3, clients=CLIENTS, **sizes)
            told = load(port_of(server), seconds=options.seconds, clients=CLIENTS, **sizes)
        found[processes] = {"rows_per_s": told["rows_per_s"], "by_status": told["by_status"]}
    return found


@contextmanager
def made(folder: Path | None, shape: str, precision: str, device: str) -> Iterator[Path]:
    """A folder with a base, a bundle and a packed file of `CUSTOMERS`; kept where a place is given."""
    with nullcontext(str(folder)) if folder else tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if not (place / f"{CUSTOMERS}.packed").exists():
            place.mkdir(parents=True, exist_ok=True)
            prepare(place, shape, ROOT)
            kind = ("--precision", precision, "--provider", device)
            run_command(ROOT, place, "export", "base", "--basis", "basis.safetensors", *kind, "-o", "bundle")
            pack(place, CUSTOMERS, SPREAD)
        yield place


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="mpnet", choices=["mpnet", "minilm"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round of one kind")
    parser.add_argument("--processes", type=int, nargs="*", default=[0, 2, 6])
    parser.add_argument("--connections", type=int, default=64, help="of each of the clients, one text a request")
    parser.add_argument("--folder", type=Path, help="where an earlier run made its files, or to make them in")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    with made(options.folder, options.shape, options.precision, options.device.partition(":")[0]) as folder:
        record: dict[str, Any] = {"shape": options.shape, "precision": options.precision, "customers": CUSTOMERS}
        record["binary"] = binary(folder, options)
        print(json.dumps(record["binary"]), flush=True)
        if options.processes:
            record["one_text"] = one_text(folder, options)
            print(json.dumps(record["one_text"]))
    write_json(options.output, record | {"environment": environment(options.device.partition(":")[0])})


if __name__ == "__main__":
    main()
