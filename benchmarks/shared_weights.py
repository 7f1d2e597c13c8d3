"""Several sessions of one bundle in a process: what a further one takes, shared and apart, and runs of two at once.

    python -m benchmarks.shared_weights -o benchmarks/results/shared_weights_cpu.json

Each way is measured in a process of its own, which opens the bundle again and again and runs a batch in each session.
"Apart" sessions are opened with a `configure`, which does nothing else.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measuring import environment

SESSIONS, BATCH, LENGTH, ROUNDS = 5, 8, 64, 15


def work(folder: Path, shared: bool, threads: int) -> dict[str, Any]:
    """Memory and time of sessions of the switchable bundle in `folder`, in this process."""
    from qrlora_deploy.runtime import Device, SwitchableSession, open_bundle

    bundle = open_bundle(folder)
    device = Device() if shared else Device(configure=lambda _: None)
    inputs = _inputs(bundle)
    memory, opening, sessions = [_memory()], [], []
    for _ in range(SESSIONS):
        start = time.perf_counter()
        sessions.append(SwitchableSession(bundle, device, threads=threads))
        opening.append(time.perf_counter() - start)
        logits = sessions[-1].predict(inputs, [None] * BATCH)[0]
        memory.append(_memory())
    pairs = [_at_once(sessions[:2], inputs) for _ in range(ROUNDS)]
    further = {name: (memory[-1][name] - memory[1][name]) / (SESSIONS - 1) / 1e6 for name in memory[0]}
    return {
        "threads": threads,
        "first_session_mb": {name: (memory[1][name] - memory[0][name]) / 1e6 for name in memory[0]},
        "further_session_mb": further,
        "opening_ms": [1e3 * seconds for seconds in opening],
        "two_at_once_ms": 1e3 * float(np.median(pairs)),
        "logits": np.float64(logits).ravel().tolist(),
    }


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Every way in turns, each time in a new process."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for way in ("shared", "apart"):
            for threads in (1, 2):
                worker = ["-m", "benchmarks.shared_weights", "--worker", way, str(folder), f"{threads}"]
                done = subprocess.run([sys.executable, *worker], capture_output=True, text=True, check=True)
                found.setdefault(f"{way}, {threads} threads", []).append(json.loads(done.stdout))
    answers = {tuple(run.pop("logits")) for runs in found.values() for run in runs}
    if len(answers) > 1:
        raise SystemExit("sessions answer differently")
    return {"sessions": SESSIONS, "batch": BATCH, "length": LENGTH, "ways": found, "environment": environment("cpu")}


def _inputs(bundle: Any) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(1).integers(1000, 20000, (BATCH, LENGTH))
    made = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
    return {record.name: made[record.name] for record in bundle.manifest.inputs if record.name in made}


def _memory() -> dict[str, int]:
    """Resident bytes, and those of them that no file is behind: pages of a mapped file are in memory once."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    pages = {name: 1024 * int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines)}
    return {"resident": pages["Rss"], "own": pages["Pss_Anon"]}


def _at_once(sessions: list[Any], inputs: dict[str, np.ndarray]) -> float:
    """Seconds until both sessions, each in a thread of its own, have run one batch."""
    runs = [threading.Thread(target=it.predict, args=(inputs, [None] * BATCH)) for it in sessions]
    start = time.perf_counter()
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    return time.perf_counter() - start


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a switchable bundle; MiniLM's shape is exported without one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        way, folder, threads = arguments.worker
        print(json.dumps(work(Path(folder), way == "shared", int(threads))))
        return
    with tempfile.TemporaryDirectory() as place:
        record = measure(arguments.bundle or _exported(Path(place)), arguments.rounds)
    for way, runs in record["ways"].items():
        print(f"{way}: {_medians(runs)}")
    if arguments.output:
        from qrlora_deploy.io.files import write_json

        write_json(arguments.output, record)


def _exported(folder: Path) -> Path:
    from benchmarks.common.serving import prepare
    from qrlora_deploy.rank_rules.energy_share import EnergyShare

    return prepare(folder, "minilm", 1, EnergyShare(0.5), "cpu").switchable.folder


def _medians(runs: list[dict[str, Any]]) -> str:
    def median(*path: str) -> float:
        values: Any = runs
        for name in path:
            values = [value[name] for value in values]
        return float(np.median(values))

    further = ", ".join(f"{median('further_session_mb', name):.1f} MB {name}" for name in ("resident", "own"))
    return f"a further session takes {further}; two at once {median('two_at_once_ms'):.0f} ms"


if __name__ == "__main__":
    main()
