"""Memory, open files and threads of a server's processes, and whether they grow."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.server_soak.told import now

WARM_UP = 0.3
"""Of the time that a process is watched: what it grows then is what it needs."""

MOST_KB_MIN = 100.0
"""A process that grows faster afterwards leaks."""

LEAST_MIN = 5.0
"""In a shorter time a process still grows to what it needs."""


def processes_of(pid: int) -> dict[int, str]:
    """A server's process and its children by what they are: "server", or "supervisor", "front" and "engine"."""
    found = {
        number: next(role for role in ("front", "engine", "other") if f'"role":"{role}"' in words or role == "other")
        for number, words in _children(pid)
    }
    return {pid: "supervisor" if found else "server"} | found


def _children(pid: int) -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and _fields(int(entry.name))[1] == str(pid):
                yield int(entry.name), (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue


def _fields(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@dataclass
class Watched:
    """Samples of a process, one a row: time in s, resident kB, open files, threads.

    Attributes:
        role: what the process is.
        samples: so far.
    """

    role: str
    samples: list[tuple[float, float, int, int]] = field(default_factory=list)

    def look(self, pid: int) -> None:
        """Take a sample; none of a process that has ended."""
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            files, threads = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()), int(_fields(pid)[17])
        except OSError:
            return
        self.samples.append((now(), pages * os.sysconf("SC_PAGE_SIZE") / 1024, files, threads))

    def record(self) -> dict[str, Any]:
        """What became of it, and the slope after the warm-up."""
        times, memory, files, threads = np.array(self.samples).T
        late = times >= times[0] + WARM_UP * (times[-1] - times[0])
        slope = float(np.polyfit(times[late] / 60, memory[late], 1)[0]) if late.sum() > 2 else 0.0
        return {
            "role": self.role,
            "minutes": (times[-1] - times[0]) / 60,
            "minutes_fitted": (times[late][-1] - times[late][0]) / 60,
            "kb_per_min": slope,
            "rss_mb": {"first": memory[0] / 1024, "after_warm_up": memory[late][0] / 1024, "last": memory[-1] / 1024},
            "open_files": _bounds(files, late),
            "threads": _bounds(threads, late),
        }


def _bounds(values: np.ndarray, late: np.ndarray) -> Mapping[str, int]:
    ends = {"first": values[0], "least": values[late].min(), "most": values.max(), "last": values[-1]}
    return {name: int(value) for name, value in ends.items()}
