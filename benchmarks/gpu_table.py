"""Ten million customers in one session: loading them, what they cost a run, and swaps beside runs.

    python -m benchmarks.gpu_table --device cuda --out benchmarks/results/table_h200.json
    python -m benchmarks.gpu_table --device cpu --customers 200000

Exports a switchable bundle with an fp16 table (RoBERTa-base's shape on a GPU, a tiny one on the CPU,
random weights; or `--bundle`), makes a packed file, loads it into one session and a hundred of its
customers one by one into another. First rows are read back and the answers of both are compared;
then runs of both are timed in turn, swaps alone and beside threads that keep the session busy, and the
throughput in windows with and without swaps that take turns.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.records import environment, summary
from benchmarks.serving import make_inputs
from benchmarks.table_parts.customers import Crowd, make_bundle, place_for
from benchmarks.table_parts.load import Busy, Swapper, rates_beside_swaps
from benchmarks.table_parts.parts import repeated, timed_load
from qrlora_deploy.bench.statistics import ratio_in_rounds
from qrlora_deploy.files import write_json
from qrlora_deploy.runtime import Buckets, Bundle, SwitchableSession, open_bundle
from qrlora_deploy.runtime.cuda import HOST_TO_DEVICE, free_bytes
from qrlora_deploy.runtime.layout import TABLE
from qrlora_deploy.runtime.memory import CudaMemory

FEW = 100
READ_BACK = 500
SWAPS = 5000
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""Between the two sessions, whose graphs and rows are the same."""

Inputs = dict[str, np.ndarray]


class Stage:
    """Two sessions of one bundle: with all customers, and with a few of them."""

    def __init__(self, bundle: Bundle, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.crowd = Crowd(bundle.manifest, arguments.customers)
        batch, length = arguments.batch, arguments.length
        buckets = Buckets((batch,), (length,)) if arguments.device == "cuda" else None
        self.sessions = {
            name: SwitchableSession(bundle, arguments.device, rows=rows, buckets=buckets)
            for name, rows in (("few", 2 * FEW), ("all", 64))
        }
        self.few, self.all = self.sessions["few"], self.sessions["all"]
        self.inputs = make_inputs(bundle, batch, min(length, bundle.manifest.max_length))
        self.random = np.random.default_rng(3)
        self.numbers = self.random.choice(arguments.customers, FEW, replace=False)
        self.names = self.crowd.texts(self.numbers)

    def load_few(self) -> None:
        """The few, one by one."""
        for number, name in zip(self.numbers.tolist(), self.names, strict=True):
            self.few.load(name, self.crowd.customer(number))

    def anyone(self) -> list[str]:
        """A batch of random customers, of all."""
        return self.crowd.texts(self.random.integers(self.arguments.customers, size=self.arguments.batch))

    def some(self) -> list[str]:
        """A batch of random customers, of the few."""
        return [self.names[index] for index in self.random.integers(FEW, size=self.arguments.batch)]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export, load, check, time; returns the record that is written."""
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - started:7.1f} s  {what}", flush=True)

    if arguments.bundle:
        bundle = open_bundle(arguments.bundle)
    else:
        bundle = make_bundle(folder, arguments.model, arguments.rank, arguments.device, arguments.precision)
    say(f"bundle: {bundle.manifest.total_rank} coefficients, table {bundle.manifest.table_dtype}")
    stage = Stage(bundle, arguments)
    say("two sessions are open")
    loading = _load(stage, say)
    stage.load_few()
    checks = _check(stage, arguments.precision)
    say(f"checked: {checks}")
    runs = _time_runs(stage)
    say("runs are timed")
    swaps = _time_swaps(stage)
    say("swaps are timed")
    beside = _time_beside(stage)
    say("runs beside swaps are timed")
    return {
        "model": arguments.model if not arguments.bundle else f"{bundle.manifest.base_name} ({arguments.bundle})",
        "customers": arguments.customers,
        "total_rank": bundle.manifest.total_rank,
        "table_dtype": bundle.manifest.table_dtype,
        "precision": bundle.manifest.precision,
        "batch": arguments.batch,
        "length": arguments.length,
        "loading": loading,
        "checks": checks,
        "runs": runs,
        "swaps": swaps,
        "beside": beside,
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment(arguments.device),
    }


def _load(stage: Stage, say: Any) -> dict[str, Any]:
    """Make the packed file and load it; time by its parts, and memory."""
    manifest, cuda = stage.all.manifest, stage.arguments.device == "cuda"
    size_bytes = stage.arguments.customers * (manifest.total_rank * 4 + 32)
    place = stage.arguments.folder or place_for(size_bytes)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder) / "crowd.safetensors"
        start = time.perf_counter()
        stage.crowd.write(path)
        written_s = time.perf_counter() - start
        say(f"packed file of {path.stat().st_size / 1e9:.2f} GB in {place}, written in {written_s:.1f} s")
        before = _resident_bytes(), free_bytes() if cuda else 0
        record = timed_load(stage.all, path)
        after = _resident_bytes(), free_bytes() if cuda else 0
    say(f"loaded in {record['seconds']} s, {record['gigabytes_per_second']} GB/s: {record['thread_seconds']}")
    count, table = stage.arguments.customers, stage.all.table
    return record | {
        "file_in": str(place),
        "written_seconds": round(written_s, 2),
        "table_bytes": table.memory.size_bytes,
        "device_bytes_grown": before[1] - after[1] if cuda else None,
        "resident_bytes_grown": after[0] - before[0],
        "index_bytes_per_customer": round(table.index_bytes / count, 1),
        "table_bytes_per_customer": round(table.memory.size_bytes / count, 1),
    }


def _resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


def _check(stage: Stage, precision: str) -> dict[str, Any]:
    """Rows read back equal what was packed, and both sessions give the same customers the same answers."""
    numbers = stage.random.choice(stage.arguments.customers, min(READ_BACK, stage.arguments.customers), replace=False)
    names = stage.crowd.texts(numbers)
    held, missing = stage.all.table.hold(names)
    part = stage.all.table.memory.parts[TABLE]
    found = np.concatenate([part.read_rows(held[name], 1) for name in names]) if not missing else np.empty(0)
    stage.all.table.release(held.values())
    layout = stage.all.layout
    expected = np.stack([layout.row(row.astype(np.float32)) for row in stage.crowd.values(numbers)])
    if missing or not np.array_equal(found, expected):
        raise SystemExit("rows of the table are not those of the packed file")
    error = effect = 0.0
    for start in range(0, FEW - 1, stage.arguments.batch):
        batch = list(itertools.islice(itertools.cycle(stage.names), start, start + stage.arguments.batch))
        logits = [session.predict(stage.inputs, batch)[0] for session in stage.sessions.values()]
        base = stage.few.predict(stage.inputs, [None] * len(batch))[0]
        error = max(error, float(np.abs(logits[0] - logits[1]).max()))
        effect = max(effect, float(np.abs(logits[0] - base).max()))
    if not error < min(TOLERANCES.get(precision, 1e-2), effect / 10):
        raise SystemExit(f"the two sessions do not agree (error {error:.1e}, effect of the customers {effect:.1e})")
    return {"rows_read_back": len(numbers), "max_abs_error": error, "effect": effect}


def _time_runs(stage: Stage) -> dict[str, Any]:
    """Batches of both sessions in turn: always the same customers, and others every time."""
    fixed = stage.names[: stage.arguments.batch]
    fixed = (fixed * -(-stage.arguments.batch // len(fixed)))[: stage.arguments.batch]
    kinds = {
        "few, the same": (stage.few, lambda: fixed),
        "all, the same": (stage.all, lambda: fixed),
        "few, random": (stage.few, stage.some),
        "all, random": (stage.all, stage.anyone),
    }
    samples: dict[str, list[float]] = {name: [] for name in kinds}
    looking: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(stage.arguments.warmup + stage.arguments.runs):
        for name in stage.random.permutation(list(kinds)):
            session, choose = kinds[name]
            # The session's first run after another one has rested; the second counts.
            session.predict(stage.inputs, choose())
            run, look = choose(), choose()
            seconds = repeated(lambda session=session, run=run: session.predict(stage.inputs, run), 1)  # type: ignore[misc]
            looked = repeated(lambda session=session, look=look: _look_up(session, look), 1)  # type: ignore[misc]
            if turn >= stage.arguments.warmup:
                samples[name] += seconds
                looking[name] += looked
    ratios = {}
    for what in ("the same", "random"):
        found = ratio_in_rounds(np.array(samples[f"all, {what}"]), np.array(samples[f"few, {what}"]))
        ratios[what] = None if found is None else {"value": found.value, "low": found.low, "high": found.high}
    return {
        "latency_ms": {name: summary(values) for name, values in samples.items()},
        "look_up_us": {name: summary(values, 1e6) for name, values in looking.items()},
        "ratio_all_to_few": ratios,
    }


def _look_up(session: SwitchableSession, names: list[str]) -> None:
    held, _missing = session.table.hold(names)
    session.table.release(held.values())


def _swapper(stage: Stage, names: list[str]) -> Swapper:
    versions = [stage.crowd.customer(number, factor) for number, factor in ((1, 1.0), (2, -1.0))]
    return Swapper(stage.all, names, versions, stage.arguments.swaps_per_second)


def _time_swaps(stage: Stage) -> dict[str, Any]:
    """Swaps on an idle device: as they come, without the copy, and the copy alone."""
    numbers = stage.random.integers(stage.arguments.customers, size=SWAPS)
    others, one = _swapper(stage, stage.crowd.texts(numbers)), _swapper(stage, stage.names[:1])
    for _ in range(SWAPS):
        others.swap()
        one.swap()
    part = stage.all.table.memory.parts[TABLE]
    record = {"another every time": summary(others.samples, 1e6), "always the same": summary(one.samples, 1e6)}
    row = part.read_rows(1, 1)[0]
    spare = stage.all.table.memory.rows - 1
    record["the copy alone"] = summary(repeated(lambda: part.write(spare, row), SWAPS), 1e6)
    if isinstance(part, CudaMemory):
        copies, place = part.buffer.copies, part.buffer.pointer + spare * row.nbytes
        pinned = part.staging(1)
        address, size_bytes = int(pinned.ctypes.data), row.nbytes
        small = repeated(lambda: copies.copy_small(place, address, size_bytes), SWAPS)
        waited = repeated(lambda: copies.copy(place, address, size_bytes, HOST_TO_DEVICE), SWAPS)
        record["copy asked until done"] = summary(small, 1e6)
        record["copy waited for"] = summary(waited, 1e6)
    original = type(part).write
    type(part).write = lambda *_: None  # type: ignore[method-assign]
    try:
        without = _swapper(stage, stage.names[:1])
        for _ in range(SWAPS):
            without.swap()
    finally:
        type(part).write = original  # type: ignore[method-assign]
    return {"idle_us": record | {"without the copy": summary(without.samples, 1e6)}}


def _time_beside(stage: Stage) -> dict[str, Any]:
    """Throughput with and without swaps in windows that take turns, and the swaps' own times in them."""
    batches = [stage.anyone() for _ in range(256)]
    turn = itertools.count()
    swapper = _swapper(stage, stage.anyone() + stage.names)
    with Busy(stage.all, stage.inputs, lambda: batches[next(turn) % len(batches)]) as busy:
        time.sleep(stage.arguments.window)
        without, beside = rates_beside_swaps(busy, swapper, stage.arguments.windows, stage.arguments.window)
    found = ratio_in_rounds(beside, without)
    return {
        "batches_per_second_without": float(np.median(without)),
        "batches_per_second_with": float(np.median(beside)),
        "ratio": None if found is None else {"value": found.value, "low": found.low, "high": found.high},
        "windows": stage.arguments.windows,
        "window_seconds": stage.arguments.window,
        "swaps_per_second": stage.arguments.swaps_per_second,
        "swap_us": summary(swapper.samples, 1e6),
    }


def bars(record: dict[str, Any]) -> list[tuple[str, float | None, float, bool]]:
    """What was aimed at: name, found, limit, and whether it is met."""
    ratios, beside = record["runs"]["ratio_all_to_few"], record["beside"]
    limits = [
        ("cold-start load, GB/s", record["loading"]["gigabytes_per_second"], 1.0, "least"),
        ("run with all / with 100, same customers", _value(ratios["the same"]), 1.01, "most"),
        ("run with all / with 100, random ones", _value(ratios["random"]), 1.01, "most"),
        ("swap while busy, p50, us", beside["swap_us"]["p50"], 20.0, "most"),
        ("swap while busy, p99, us", beside["swap_us"]["p99"], 100.0, "most"),
        ("throughput with swaps / without", _value(beside["ratio"]), 0.99, "least"),
    ]
    return [
        (name, found, limit, found is not None and (found >= limit if side == "least" else found <= limit))
        for name, found, limit, side in limits
    ]


def _value(ratio: dict[str, float] | None) -> float | None:
    return None if ratio is None else ratio["value"]


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--customers", type=int, default=10_000_000)
    parser.add_argument("--bundle", type=Path, help="a switchable bundle, instead of one that is exported here")
    parser.add_argument("--model", choices=["tiny", "minilm", "roberta-base"], help="by default after the device")
    parser.add_argument("--precision", choices=["fp32", "fp16"], help="by default after the device")
    parser.add_argument("--rank", type=int, help="of each of the four targets")
    parser.add_argument("--batch", type=int, help="rows of a batch")
    parser.add_argument("--length", type=int, help="tokens of a row")
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--swaps-per-second", type=float, default=1000.0)
    parser.add_argument("--windows", type=int, default=40, help="of each kind, with swaps and without")
    parser.add_argument("--window", type=float, default=0.4, help="seconds")
    parser.add_argument("--folder", type=Path, help="where the packed file goes; by default the system's memory")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    defaults = {
        "cuda": {"model": "roberta-base", "precision": "fp16", "rank": 160, "batch": 64, "length": 128},
        "cpu": {"model": "tiny", "precision": "fp32", "rank": 64, "batch": 8, "length": 16},
    }
    for name, value in defaults[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    onnxruntime.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, Path(folder))
    record["bars"] = [dict(zip(("name", "found", "limit", "met"), bar, strict=True)) for bar in bars(record)]
    for name, figures in record["runs"]["latency_ms"].items():
        look = record["runs"]["look_up_us"][name]["p50"]
        print(f"run, {name:16} p50 {figures['p50']:8.3f} ms, of which look-up {look:6.1f} us")
    for name, figures in record["swaps"]["idle_us"].items():
        print(f"swap, {name:22} p50 {figures['p50']:7.1f} us  p99 {figures['p99']:7.1f} us")
    for bar in record["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['name']:42} {bar['found']} (limit {bar['limit']})")
    if arguments.out:
        write_json(arguments.out, record)
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
