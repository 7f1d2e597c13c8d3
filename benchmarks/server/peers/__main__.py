"""What `serve` reaches beside FastAPI, LitServe and MLServer over the same session, and PEFT's mixed batch in LitServe.

    python -m benchmarks.server.peers --packages litserve=FOLDER mlserver=FOLDER -o benchmarks/results/server_peers.json

A folder of packages is what `pip install --target FOLDER litserve` writes, of FastAPI and LitServe or of MLServer (with
uvloop 0.21: its processes for models do not start with later ones); none of them need be where the product is. All
servers run at the same time, each in processes of its own, and have their turn of each round in a random order, by the
same requests from the same client. Each is checked before anything is timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measuring import environment
from benchmarks.export_speed import ROOT, variables_of
from benchmarks.server.__main__ import load
from benchmarks.server.gpu import CUSTOMERS, made
from benchmarks.server.peers.answering import Behind
from benchmarks.server.peers.checking import check, reference
from benchmarks.server.peers.contestants import Contestant, Running, started
from qrlora_deploy.io.files import write_json

VERSIONS = ("fastapi", "starlette", "uvicorn", "pydantic", "litserve", "mlserver", "peft", "torch", "transformers")
PEFT = "peft behind litserve"


def contestants(folder: Path, options: argparse.Namespace) -> list[Contestant]:
    """All that are asked for; the product first."""
    packages = {name: Path(path).resolve() for name, _, path in (word.partition("=") for word in options.packages)}
    session = Behind("session", str(folder), CUSTOMERS, options.device, options.precision)
    peft = Behind("peft", str(folder), options.adapters, options.device, options.precision)
    litserve, mlserver = packages.get("litserve"), packages.get("mlserver")
    most = max(options.processes)
    fronts = max(1, most)
    found = [
        Contestant("serve", None, session, most),
        *(Contestant(f"serve, {n} fronts", None, session, n) for n in options.processes if n != most),
        Contestant("fastapi", "by_fastapi", session, 1, packages=litserve),
        Contestant("litserve", "by_litserve", session, fronts, packages=litserve),
        Contestant(PEFT, "by_litserve", peft, fronts, packages=litserve),
        Contestant("mlserver", "by_mlserver", session, 1, "infer", packages=mlserver),
    ]
    if most > 1:
        found.append(Contestant("serve, 2 engines", None, session, most, engines=2))
        name = f"fastapi, {options.workers} sessions"
        found.append(Contestant(name, "by_fastapi", session, options.workers, packages=litserve))
    return [one for one in found if one.name not in options.without]


def versions(contestant: Contestant) -> dict[str, str]:
    """Of the packages that its processes import."""
    code = (
        "import importlib.metadata as m, json, sys\nfound = {}\nfor name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, *VERSIONS]
    told = subprocess.run(command, env=dict(contestant.variables()), check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(told.stdout)
    return found


def rounds(servers: list[Running], options: argparse.Namespace) -> dict[str, Any]:
    """Rows a second of each server by rows of a request; rounds in a random order."""
    random, found = np.random.default_rng(0), {}
    for rows, connections in ((16, options.connections_of_16), (1, options.connections)):
        rates: dict[str, list[float]] = {one.contestant.name: [] for one in servers}
        p50: dict[str, list[float]] = {one.contestant.name: [] for one in servers}
        for turn in range(options.rounds + 1):
            for number in random.permutation(len(servers)):
                one = servers[number].contestant
                told = load(
                    servers[number].port,
                    clients=options.clients,
                    rows=rows,
                    customers=one.behind.customers,
                    connections=connections,
                    form=one.form,
                    seconds=options.seconds,
                )
                if set(told["by_status"]) != {"200"}:
                    raise SystemExit(f"{one.name} answers by {told['by_status']}")
                # The first turn warms it up.
                if turn:
                    rates[one.name].append(told["rows_per_s"])
                    p50[one.name].append(told["by_status"]["200"]["p50"])
        found[f"{rows} rows a request"] = _of_kind(rates, p50) | {"connections": connections * options.clients}
        print(json.dumps(found[f"{rows} rows a request"]["serve_by"]), flush=True)
    return found


def _of_kind(rates: dict[str, list[float]], p50: dict[str, list[float]]) -> dict[str, Any]:
    ours = rates["serve"]
    ratios = {
        name: statistics.median(own / other for own, other in zip(ours, values, strict=True))
        for name, values in rates.items()
        if name != "serve"
    }
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "rows_per_s": medians,
        "samples": rates,
        "p50_ms": {k: statistics.median(v) for k, v in p50.items()},
        "serve_by": ratios,
    }


def adapters_that_fit(folder: Path, seconds: float) -> dict[str, Any]:
    """How many adapters PEFT has added after so many seconds, and what one takes then."""
    command = [sys.executable, "-m", "benchmarks.server.peers.adapters", str(folder), str(seconds)]
    told = subprocess.run(command, env=variables_of(ROOT), check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Check and time all of them."""
    asked, record = contestants(folder, options), {}
    if options.adapters_seconds:
        record["adapters"] = adapters_that_fit(folder, options.adapters_seconds)
        print(json.dumps(record["adapters"]), flush=True)
    references = {one.behind.kind: reference(one.behind) for one in asked}
    with started(asked, folder) as servers:
        record["servers"] = {}
        for one in servers:
            contestant, found = one.contestant, check(one, references[one.contestant.behind.kind])
            told = {"customers": contestant.behind.customers, "processes": contestant.processes}
            record["servers"][contestant.name] = told | found | {"versions": versions(contestant)}
            print(contestant.name, found, flush=True)
        references.clear()
        record["by_rows"] = rounds(servers, options)
    return record


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", nargs="*", default=[], metavar="litserve|mlserver=FOLDER")
    parser.add_argument("--without", nargs="+", default=[], help="names of servers that are left out")
    parser.add_argument("--shape", default="minilm", choices=["mpnet", "minilm"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16"])
    parser.add_argument("--processes", type=int, nargs="+", default=[0], help="of serve; the most, of LitServe too")
    parser.add_argument("--workers", type=int, default=4, help="with --processes: FastAPI's, each with a session")
    parser.add_argument("--adapters", type=int, default=200, help="that PEFT has")
    parser.add_argument("--adapters-seconds", type=float, default=0.0, help="count how many PEFT adds in this time")
    parser.add_argument("--clients", type=int, default=1, help="processes that ask")
    parser.add_argument("--connections", type=int, default=16, help="of each, one row a request")
    parser.add_argument("--connections-of-16", type=int, default=4, help="of each, 16 rows a request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a server's turn")
    parser.add_argument("--folder", type=Path, help="where an earlier run made its files, or to make them in")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    begin = time.perf_counter()
    with made(options.folder, options.shape, options.precision, options.device) as folder:
        record = measure(folder, options)
    asked = {name: getattr(options, name) for name in ("shape", "precision", "rounds", "seconds", "clients")}
    write_json(options.output, asked | record | {"environment": environment(options.device)})
    print(f"{time.perf_counter() - begin:.0f} s, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
