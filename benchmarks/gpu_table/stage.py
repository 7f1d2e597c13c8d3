"""What is measured: two sessions of one bundle, filled and checked."""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.serving import make_inputs
from benchmarks.gpu_table.busy import Swapper
from benchmarks.gpu_table.customers import Crowd, place_for
from benchmarks.gpu_table.loading import timed_load
from qrlora_deploy.runtime import Buckets, Bundle, SwitchableSession
from qrlora_deploy.runtime.bundle.row_layout import TABLE
from qrlora_deploy.runtime.table.cuda import free_bytes

FEW = 100
READ_BACK = 500
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""Between the two sessions, whose graphs and rows are the same."""


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

    def swapper(self, names: list[str]) -> Swapper:
        """Two versions for customers of the large session."""
        versions = [self.crowd.customer(number, factor) for number, factor in ((1, 1.0), (2, -1.0))]
        return Swapper(self.all, names, versions, self.arguments.swaps_per_second)


def load(stage: Stage, say: Callable[[str], None]) -> dict[str, Any]:
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


def check(stage: Stage, precision: str) -> dict[str, Any]:
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
