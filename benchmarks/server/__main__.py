"""What `serve` reaches: beside the session within the process, and with very many customers.

    python -m benchmarks.server -o benchmarks/results/server_cpu.json

The server, its client and the session have the same cores, each in a process of its own; rounds alternate. Customers
are drawn by Zipf, texts are real ones of different lengths.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measuring import environment
from benchmarks.export_speed import ROOT, prepare, run_command, variables_of
from benchmarks.server.load import name_of
from qrlora_deploy.io.files import write_json
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.customers.packed_writer import write_packed_blocks

MANY = (1, 1_000, 100_000)
CONNECTIONS = 4
SESSION = """
import json, sys, time
import numpy as np
from benchmarks.server.load import name_of
from qrlora_deploy.data.sample import sample_texts
from qrlora_deploy.runtime import Predictor, SwitchableSession, load_packed, open_bundle

bundle, packed, customers = sys.argv[1], sys.argv[2], int(sys.argv[3])
session = SwitchableSession(open_bundle(bundle))
load_packed(session, packed)
predictor, texts, random = Predictor(session), sample_texts(), np.random.default_rng(0)
print("ready", flush=True)
for line in sys.stdin:
    rows, seconds = line.split()
    rows, seconds, samples = int(rows), float(seconds), []
    start, before = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        chosen = [texts[index] for index in random.integers(len(texts), size=rows)]
        owners = [name_of(int(owner)) for owner in random.integers(customers, size=rows)]
        begin = time.perf_counter()
        predictor.predict(chosen, customers=owners, batch_size=rows)
        samples.append(time.perf_counter() - begin)
    print(json.dumps({
        "rows_per_s": rows * len(samples) / (time.perf_counter() - start),
        "p50_ms": float(np.percentile(samples, 50) * 1e3),
        "cpu_us": 1e6 * (time.process_time() - before) / len(samples),
    }), flush=True)
"""


class Process:
    """A process that says when it is ready and is asked by lines."""

    def __init__(self, *command: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables_of(ROOT),
        )
        self.first = self.line()

    def line(self) -> str:
        """The next line of its output."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline()

    def ask(self, line: str) -> dict[str, Any]:
        """What it answers to a line."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()
        answer: dict[str, Any] = json.loads(self.line())
        return answer

    @property
    def cpu_s(self) -> float:
        """CPU seconds so far."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def rss_mb(self) -> float:
        """Memory that it holds, in MB."""
        pages = int(Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def running(*command: str) -> Iterator[Process]:
    """A process that is ended at the end."""
    process = Process(*command)
    try:
        yield process
    finally:
        process.popen.terminate()
        process.popen.wait()


def serving(folder: Path, customers: int, *options: str) -> Any:
    """A server of so many customers."""
    packed = str(folder / f"{customers}.packed")
    command = ("-m", "qrlora_deploy.cli", "serve", str(folder / "bundle"), "--packed", packed, "--port", "0", *options)
    return running(*command)


def port_of(server: Process) -> int:
    """Where it listens, which it says first."""
    return int(server.first.strip().rpartition(":")[2])


def load(port: int, clients: int = 1, **options: float | str) -> dict[str, Any]:
    """What the client saw; of several clients the first one's percentiles, and the rows of all."""
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "benchmarks.server.load", f"--port={port}", *words]
    asking = [
        subprocess.Popen([*command, f"--seed={seed}"], stdout=subprocess.PIPE, env=variables_of(ROOT))
        for seed in range(clients)
    ]
    told = [json.loads(one.communicate()[0]) for one in asking]
    record: dict[str, Any] = told[0] | {"rows_per_s": sum(one["rows_per_s"] for one in told)}
    return record


def make(folder: Path, shape: str) -> None:
    """A bundle, and packed files of `MANY` customers."""
    prepare(folder, shape, ROOT)
    run_command(ROOT, folder, "export", "base", "--basis", "basis.safetensors", "-o", "bundle")
    for count in MANY:
        pack(folder, count)


def pack(folder: Path, count: int, spread: float = 0.5) -> None:
    """A packed file of so many customers of the bundle, their coefficients drawn with this standard deviation."""
    manifest = open_bundle(folder / "bundle").manifest
    values = np.random.default_rng(count).normal(0, spread, (count, manifest.total_rank)).astype(np.float32)
    write_packed_blocks([([name_of(number) for number in range(count)], values)], folder / f"{count}.packed", manifest)


def beside_the_session(folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Saturation with 16 rows a request, and one row at a time, by what the session alone does."""
    customers = MANY[1]
    packed = str(folder / f"{customers}.packed")
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with (
        serving(folder, customers) as server,
        running("-c", SESSION, str(folder / "bundle"), packed, str(customers)) as session,
    ):
        port = port_of(server)
        load(port, rows=16, customers=customers, connections=CONNECTIONS, seconds=2)
        for _ in range(rounds):
            alone = session.ask(f"16 {seconds}")
            served = load(port, rows=16, customers=customers, connections=CONNECTIONS, seconds=seconds)
            note("rows of 16 a second, session", alone["rows_per_s"])
            note("rows of 16 a second, server", served["rows_per_s"])
            note("16 rows, server by session", served["rows_per_s"] / alone["rows_per_s"])
            one = session.ask(f"1 {seconds}")
            before = server.cpu_s
            single = load(port, rows=1, customers=customers, connections=1, seconds=seconds)["by_status"]["200"]
            note("one row, ms added to p50", single["p50"] - one["p50_ms"])
            note("one row, CPU us of the session", one["cpu_us"])
            note("one row, CPU us of the server", 1e6 * (server.cpu_s - before) / single["requests"])
            batched = load(port, rows=1, customers=customers, connections=16, seconds=seconds)
            note(
                "one row, 16 connections, rows a second by session's one row", batched["rows_per_s"] / one["rows_per_s"]
            )
    return {name: {"median": statistics.median(values), "samples": values} for name, values in found.items()}


def with_many_customers(folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """The same traffic with few and with very many customers, and the memory of each server."""
    rates: dict[int, list[float]] = {count: [] for count in MANY}
    memory = {}
    with serving(folder, MANY[0]) as few, serving(folder, MANY[1]) as some, serving(folder, MANY[2]) as many:
        servers = dict(zip(MANY, (few, some, many), strict=True))
        for count, server in servers.items():
            load(port_of(server), rows=16, customers=count, connections=CONNECTIONS, seconds=1)
        for turn in range(rounds):
            for count in MANY if turn % 2 else reversed(MANY):
                port = port_of(servers[count])
                found = load(port, rows=16, customers=count, connections=CONNECTIONS, seconds=seconds)
                rates[count].append(found["rows_per_s"])
        memory = {count: server.rss_mb for count, server in servers.items()}
    medians = {count: statistics.median(values) for count, values in rates.items()}
    return {
        "rows_per_s": medians,
        "by_one_customer": {count: value / medians[MANY[0]] for count, value in medians.items()},
        "memory_mb": memory,
    }


PARTS = {"beside_the_session": beside_the_session, "customers": with_many_customers}


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="minilm", choices=["mpnet", "minilm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round of one kind")
    parser.add_argument("--only", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.shape)
        record: dict[str, Any] = {
            "shape": options.shape,
            "rounds": options.rounds,
            "seconds": options.seconds,
        }
        for part in options.only:
            record[part] = PARTS[part](folder, options.rounds, options.seconds)
    write_json(options.output, record | {"environment": environment("cpu")})
    print(json.dumps(record, indent=1), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
