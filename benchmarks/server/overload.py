"""A server that is asked twice as much as it can answer: goodput, refusals, and the waiting of those who are let in.

    python -m benchmarks.server.overload -o benchmarks/results/server_overload.json
    python -m benchmarks.server.overload --server-cpus 0-5 --client-cpus 6-11 --threads 4 --against CHECKOUT

One-row requests of 1,000 customers come by a Poisson clock whatever is answered. The peak is what 32 connections
reach that each ask again as soon as they are answered. With another checkout of the project, its server takes turns
with this one's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from benchmarks.common.measuring import environment
from benchmarks.export_speed import ROOT, checkouts_of, prepare, run_command, variables_of
from benchmarks.server.__main__ import pack
from benchmarks.server.load import Told, percentiles_ms
from qrlora_deploy.io.files import write_json

CUSTOMERS = 1000
PEAK_CONNECTIONS, CONNECTIONS = 32, 512
QUEUE_BY_CALM = 2.5
"""A queue in ms may be so many times what one request takes without any load."""

ROWS, BY_CALM, BY_REQUESTS, USUAL = "64 rows", "by time", "two requests", "no option"


@dataclass(frozen=True)
class Place:
    """Where it runs.

    Attributes:
        folder: with the bundle and the customers.
        threads: of the server's runs; 0: as many as it likes.
        server_cpus: that the server may use, as taskset takes them; empty: all.
        client_cpus: that its clients may use.
        clients: processes that ask at the same time.
    """

    folder: Path
    threads: int
    server_cpus: str
    client_cpus: str
    clients: int


def pinned(cpus: str) -> list[str]:
    """The begin of a command that may use these processors."""
    return ["taskset", "-c", cpus] if cpus else []


@contextmanager
def serving(place: Place, checkout: Path, *options: str) -> Iterator[int]:
    """The port of a server of a checkout."""
    command = [
        *pinned(place.server_cpus),
        sys.executable,
        "-m",
        "qrlora_deploy.cli",
        "serve",
        str(place.folder / "bundle"),
    ]
    command += ["--packed", str(place.folder / f"{CUSTOMERS}.packed"), "--port", "0", *options]
    threads = ["--threads", str(place.threads)] if place.threads else []
    server = subprocess.Popen([*command, *threads], stdout=subprocess.PIPE, text=True, env=variables_of(checkout))
    assert server.stdout is not None
    try:
        yield int(server.stdout.readline().strip().rpartition(":")[2])
    finally:
        server.terminate()
        server.wait()


def load(place: Place, port: int, connections: int, seconds: float, rate: float = 0.0) -> Told:
    """What clients saw; connections and rate are those of all of them together."""
    clients = min(place.clients, connections)
    words = [f"--port={port}", f"--customers={CUSTOMERS}", f"--seconds={seconds}", "--raw"]
    words += [f"--connections={connections // clients}", *([f"--rate={rate / clients}"] if rate else [])]
    command = [*pinned(place.client_cpus), sys.executable, "-m", "benchmarks.server.load", *words]
    asking = [
        subprocess.Popen([*command, f"--seed={seed}"], stdout=subprocess.PIPE, env=variables_of(ROOT))
        for seed in range(clients)
    ]
    records = [json.loads(one.communicate()[0]) for one in asking]
    return reduce(add, map(_told, records))


def _told(record: dict[str, Any]) -> Told:
    """As the client printed it: keys of JSON are texts."""
    times = {name: {int(status): found for status, found in record[name].items()} for name in ("seconds", "sent_s")}
    return Told(**times, late_s=record["late_s"], wall_s=record["wall_s"])


def bounds_of(calm_ms: float, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Options of `serve` by name."""
    known: dict[str, tuple[str, ...]] = {
        ROWS: ("--max-queue-rows", "64"),
        BY_CALM: ("--max-queue-ms", str(round(QUEUE_BY_CALM * calm_ms, 1))),
        BY_REQUESTS: ("--max-queue-ms", "0"),
        USUAL: (),
    }
    return {name: known[name] for name in names}


def round_of(place: Place, checkout: Path, seconds: float, names: Sequence[str]) -> dict[str, Any]:
    """The unloaded server, its peak, and twice that under each bound."""
    with serving(place, checkout) as port:
        load(place, port, 2, 1)
        calm = load(place, port, 1, 2).record(1)
        peak = load(place, port, PEAK_CONNECTIONS, seconds).record(1)
    calm_ms, peak_rows_s = calm["by_status"]["200"]["p50"], peak["rows_per_s"]
    found: dict[str, Any] = {"calm": calm, "peak": peak, "by_bound": {}}
    for name, options in bounds_of(calm_ms, names).items():
        with serving(place, checkout, *options) as port:
            # The server learns how fast it is.
            load(place, port, 2, 1)
            told = load(place, port, CONNECTIONS, seconds, 2 * peak_rows_s)
        record = told.record(1) | {"options": list(options)}
        record["goodput_by_peak"] = record["rows_per_s"] / peak_rows_s
        record["p99_accepted_by_unloaded"] = percentiles_ms(told.seconds[200])["p99"] / calm_ms
        record["p99_accepted_from_sent_by_unloaded"] = percentiles_ms(told.sent_s[200])["p99"] / calm_ms
        found["by_bound"][name] = record
    return found


def summed(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, by bound."""
    found: dict[str, Any] = {
        "p50_ms_unloaded": statistics.median(it["calm"]["by_status"]["200"]["p50"] for it in rounds),
        "peak_rows_per_s": statistics.median(it["peak"]["rows_per_s"] for it in rounds),
    }
    ratios = ("goodput_by_peak", "p99_accepted_by_unloaded", "p99_accepted_from_sent_by_unloaded")
    for name in rounds[0]["by_bound"]:
        of_bound = [it["by_bound"][name] for it in rounds]
        found[name] = {ratio: statistics.median(it[ratio] for it in of_bound) for ratio in ratios}
        for since, place in (("schedule", "by_status"), ("sent", "from_sent")):
            refused = [it[place].get("429", {}) for it in of_bound]
            for share in ("p50", "p99"):
                median = statistics.median(it.get(share, 0.0) for it in refused)
                found[name][f"refused_{share}_ms_from_{since}"] = median
        found[name]["client_late_p99_ms"] = statistics.median(it["client_late"]["p99"] for it in of_bound)
    return found


def measure(
    place: Place, checkouts: dict[str, Path], rounds: int, seconds: float, names: dict[str, Sequence[str]]
) -> dict[str, Any]:
    """Rounds in which each checkout has its turn."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for turn in range(rounds):
        for name in list(checkouts)[:: 1 if turn % 2 else -1]:
            samples[name].append(round_of(place, checkouts[name], seconds, names[name]))
            print(name, json.dumps(summed(samples[name][-1:])), flush=True)
    return {name: {"medians": summed(found), "rounds": found} for name, found in samples.items()}


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="minilm", choices=["mpnet", "minilm"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a run")
    parser.add_argument("--threads", type=int, default=0, help="of the server's runs; 0: as many as it likes")
    parser.add_argument("--server-cpus", default="", help="as taskset takes them; without it all")
    parser.add_argument("--client-cpus", default="")
    parser.add_argument("--clients", type=int, default=1, help="processes that ask at the same time")
    parser.add_argument(
        "--bounds", nargs="+", default=[BY_REQUESTS, USUAL], choices=[ROWS, BY_CALM, BY_REQUESTS, USUAL]
    )
    parser.add_argument("--against", type=Path, help="another checkout of the project")
    parser.add_argument("--against-bounds", nargs="+", default=[BY_CALM, ROWS])
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    checkouts = checkouts_of(options.against)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = Place(folder, options.threads, options.server_cpus, options.client_cpus, options.clients)
        prepare(folder, options.shape, ROOT)
        run_command(ROOT, folder, "export", "base", "--basis", "basis.safetensors", "-o", "bundle")
        pack(folder, CUSTOMERS)
        names = {"this": options.bounds, "other": options.against_bounds}
        found = measure(place, checkouts, options.rounds, options.seconds, names)
    setting = {key: value for key, value in vars(options).items() if key not in ("output", "against")}
    record = {"setting": setting, "cores": os.cpu_count(), "overload": found, "environment": environment("cpu")}
    if options.output is not None:
        write_json(options.output, record)
    print(
        json.dumps({name: it["medians"] for name, it in found.items()}, indent=1),
        f"{time.perf_counter() - start:.0f} s",
    )


if __name__ == "__main__":
    main()
