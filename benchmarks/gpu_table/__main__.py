"""Ten million customers in one session: loading them, what they cost a run, and swaps beside runs.

    python -m benchmarks.gpu_table --device cuda --out FILE
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.common.measuring import environment, summary
from benchmarks.gpu_table.aims import bars
from benchmarks.gpu_table.busy import Busy, Swapper, rates_beside_swaps
from benchmarks.gpu_table.customers import make_bundle
from benchmarks.gpu_table.loading import repeated
from benchmarks.gpu_table.stage import Stage, check, load
from qrlora_deploy.bench.statistics import ratio_in_rounds
from qrlora_deploy.io.files import write_json
from qrlora_deploy.runtime import SwitchableSession, open_bundle
from qrlora_deploy.runtime.bundle.row_layout import TABLE
from qrlora_deploy.runtime.table.cuda import HOST_TO_DEVICE, CudaCopies
from qrlora_deploy.runtime.table.memory import CudaMemory

SWAPS = 5000
TOGETHER = 10
"""Swaps that come one after the other where they come in groups."""


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
    loading = load(stage, say)
    stage.load_few()
    checks = check(stage, arguments.precision)
    say(f"checked: {checks}")
    runs = _time_runs(stage)
    say("runs are timed")
    swaps = _time_swaps(stage)
    say("swaps are timed")
    beside = _time_beside(stage)
    say("runs beside swaps are timed")
    crowds = _time_crowds(stage)
    say("throughput of both is timed")
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
        "throughput": crowds,
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment(arguments.device),
    }


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
    ratios = {
        what: _ratio(np.array(samples[f"all, {what}"]), np.array(samples[f"few, {what}"]))
        for what in ("the same", "random")
    }
    return {
        "latency_ms": {name: summary(values) for name, values in samples.items()},
        "look_up_us": {name: summary(values, 1e6) for name, values in looking.items()},
        "ratio_all_to_few": ratios,
    }


def _look_up(session: SwitchableSession, names: list[str]) -> None:
    held, _missing = session.table.hold(names)
    session.table.release(held.values())


def _time_swaps(stage: Stage) -> dict[str, Any]:
    """Swaps on an idle device: as they come, without the copy, and the copy alone."""
    numbers = stage.random.integers(stage.arguments.customers, size=SWAPS)
    others, one = stage.swapper(stage.crowd.texts(numbers)), stage.swapper(stage.names[:1])
    for _ in range(SWAPS):
        others.swap()
        one.swap()
    waited = stage.swapper(stage.names[:1])
    waited_s = repeated(lambda: _swap_and_wait(waited), SWAPS)
    part = stage.all.table.memory.parts[TABLE]
    record = {"another every time": summary(others.samples, 1e6), "always the same": summary(one.samples, 1e6)}
    record["until it is on the device"] = summary(waited_s, 1e6)
    # A thread that slept finds its caches cold, whatever the device does.
    rested = stage.swapper(stage.names)
    rested.run(stage.arguments.window * stage.arguments.windows / 4)
    record["at the rate of those beside runs"] = summary(rested.samples, 1e6)
    row = part.read_rows(1, 1)[0]
    spare = stage.all.table.memory.rows - 1
    record["the copy alone"] = summary(repeated(lambda: part.write(spare, row), SWAPS), 1e6)
    if isinstance(part, CudaMemory):
        record |= _time_copies(part, spare, row)
    original = type(part).write
    type(part).write = lambda *_: None  # type: ignore[method-assign]
    try:
        without = stage.swapper(stage.names[:1])
        for _ in range(SWAPS):
            without.swap()
    finally:
        type(part).write = original  # type: ignore[method-assign]
    return {"idle_us": record | {"without the copy": summary(without.samples, 1e6)}}


def _swap_and_wait(swapper: Swapper) -> None:
    swapper.swap()
    swapper.session.table.memory.settle()


def _time_copies(part: CudaMemory, spare: int, row: np.ndarray) -> dict[str, Any]:
    """Ways to copy a row to the GPU, from pinned and from plain memory."""
    copies, place, size_bytes = part.buffer.copies, part.buffer.pointer + spare * row.nbytes, row.nbytes
    pinned = part.staging(1)
    places = {"pinned": int(pinned.ctypes.data), "plain": int(row.ctypes.data)}
    record = {}
    for name, source in places.items():
        asked = repeated(lambda source=source: _copy_and_ask(copies, place, source, size_bytes), SWAPS)  # type: ignore[misc]
        begun = repeated(lambda source=source: copies.begin_copy(place, source, size_bytes), SWAPS)  # type: ignore[misc]
        copies.wait()
        waited = repeated(lambda source=source: copies.copy(place, source, size_bytes, HOST_TO_DEVICE), SWAPS)  # type: ignore[misc]
        record[f"copy from {name} memory, asked"] = summary(asked, 1e6)
        record[f"copy from {name} memory, waited"] = summary(waited, 1e6)
        record[f"copy from {name} memory, begun"] = summary(begun, 1e6)
    return record


def _copy_and_ask(copies: CudaCopies, place: int, source: int, size_bytes: int) -> None:
    copies.begin_copy(place, source, size_bytes)
    copies.wait()


def _time_beside(stage: Stage) -> dict[str, Any]:
    """Throughput with and without swaps in windows that take turns, and the swaps' own times in them."""
    batches = [stage.anyone() for _ in range(256)]
    turn = itertools.count()
    swapper = stage.swapper(stage.anyone() + stage.names)
    with Busy(stage.all, stage.inputs, lambda: batches[next(turn) % len(batches)]) as busy:
        time.sleep(stage.arguments.window)
        without, beside = rates_beside_swaps(busy, swapper, stage.arguments.windows, stage.arguments.window)
        together = stage.swapper(stage.anyone() + stage.names)
        together.run(stage.arguments.window * stage.arguments.windows / 4, TOGETHER)
    return {
        "batches_per_second_without": float(np.median(without)),
        "batches_per_second_with": float(np.median(beside)),
        "ratio": _ratio(beside, without),
        "windows": stage.arguments.windows,
        "window_seconds": stage.arguments.window,
        "swaps_per_second": stage.arguments.swaps_per_second,
        "swap_us": summary(swapper.samples, 1e6),
        "swap_in_tens_us": summary(together.samples, 1e6),
    }


def _time_crowds(stage: Stage) -> dict[str, Any]:
    """Throughput with random customers of all and of the few, in windows that take turns."""
    rates: dict[str, list[float]] = {"few": [], "all": []}
    choose = {"few": stage.some, "all": stage.anyone}
    batches = {name: [choose[name]() for _ in range(256)] for name in rates}
    for window in range(2 * stage.arguments.windows):
        name = ("few", "all", "all", "few")[window % 4]
        turn = itertools.count()
        with Busy(stage.sessions[name], stage.inputs, lambda n=name, t=turn: batches[n][next(t) % 256]) as busy:  # type: ignore[misc]
            start = time.perf_counter()
            time.sleep(stage.arguments.window / 2)
            stop = time.perf_counter()
        rates[name].append(busy.rate(start, stop))
    return {
        "batches_per_second": {name: float(np.median(values)) for name, values in rates.items()},
        "ratio_all_to_few": _ratio(np.array(rates["all"]), np.array(rates["few"])),
    }


def _ratio(samples: np.ndarray, reference: np.ndarray) -> dict[str, float] | None:
    """The median of the ratios, with its 95 % interval; None with too few rounds."""
    found = ratio_in_rounds(samples, reference)
    return None if found is None else asdict(found)


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
    parser.add_argument("--windows", type=int, default=30, help="of each kind, with swaps and without")
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
    record["bars"] = [dict(zip(("name", "found", "side", "limit", "met"), bar, strict=True)) for bar in bars(record)]
    for name, figures in record["runs"]["latency_ms"].items():
        look = record["runs"]["look_up_us"][name]["p50"]
        print(f"run, {name:16} p50 {figures['p50']:8.3f} ms, of which look-up {look:6.1f} us")
    for name, figures in record["swaps"]["idle_us"].items():
        print(f"swap, {name:32} p50 {figures['p50']:7.1f} us  p99 {figures['p99']:7.1f} us")
    for name, figures in (
        ("one by one", record["beside"]["swap_us"]),
        ("in tens", record["beside"]["swap_in_tens_us"]),
    ):
        print(f"swap beside runs, {name:20} p50 {figures['p50']:7.1f} us  p99 {figures['p99']:7.1f} us")
    for bar in record["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['name']:42} {bar['found']} ({bar['side']} {bar['limit']})")
    if arguments.out:
        write_json(arguments.out, record)
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
