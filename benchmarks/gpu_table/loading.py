"""Where the seconds of a load go: the steps of `load_packed`, timed in whatever thread they run."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qrlora_deploy.runtime import SwitchableSession
from qrlora_deploy.runtime.bundle.row_layout import TABLE
from qrlora_deploy.runtime.customers import packed, packed_tail


def timed_load(session: SwitchableSession, path: Path) -> dict[str, Any]:
    """Load a packed file; seconds in all, and of each step over all threads."""
    spent: dict[str, float] = {}
    memory_kind = type(session.table.memory.parts[TABLE])
    start = time.perf_counter()
    with (
        _timed(packed._Source, "read", "read the file", spent),
        _timed(packed, "digest_piece", "hash", spent),
        _timed(packed, "_all_finite", "check for NaN and Inf", spent),
        _timed(packed, "_spread", "pad and convert", spent),
        _timed(packed_tail, "IdIndex", "index of the ids", spent),
        _timed(memory_kind, "grown", "grow the table", spent),
        _timed(memory_kind, "staging", "staging memory", spent),
        _timed(memory_kind, "write_rows", "copy into the table", spent),
        _timed(type(session.table), "_supersede", "flip", spent),
    ):
        customers = packed.load_packed(session, path)
    seconds = time.perf_counter() - start
    size_bytes = path.stat().st_size
    return {
        "customers": customers,
        "file_bytes": size_bytes,
        "seconds": round(seconds, 3),
        "gigabytes_per_second": round(size_bytes / seconds / 1e9, 3),
        "thread_seconds": {name: round(value, 3) for name, value in spent.items()},
        "threads": packed.MOST_THREADS,
    }


@contextmanager
def _timed(owner: Any, name: str, label: str, spent: dict[str, float]) -> Iterator[None]:
    """Add up how long calls of `owner.name` take."""
    original = getattr(owner, name)
    lock = threading.Lock()

    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            with lock:
                spent[label] = spent.get(label, 0.0) + time.perf_counter() - start

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def repeated(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each call."""
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples
