"""Where hidden states are kept: device, host memory or disk, each within a bound."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from qrlora_deploy.errors import InputError

PLACES = ("device", "host", "disk")
SHARE = 0.5
"""Of what is free, at most: the rest is for training itself and for others."""

CGROUP = Path("/sys/fs/cgroup")
OPEN_FILES = Path("/proc/self/fd")


Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CacheWish:
    """What was asked for.

    Attributes:
        wanted: "auto", "device", "host" or "disk".
        folder: for a file on the disk.
        progress: called with (description, done, total) while the trunk runs.
    """

    wanted: str
    folder: Path
    progress: Progress | None = None

    def report(self, rows: int) -> Callable[[int], None] | None:
        """Tells the progress through so many rows."""
        progress = self.progress
        return None if progress is None else lambda done: progress("trunk", done, rows)


@dataclass(frozen=True)
class Room:
    """Where hidden states go.

    Attributes:
        place: one of `PLACES`.
        folder: of the file on the disk, which has no name there, so that nothing is left behind.
    """

    place: str = "host"
    folder: Path | None = None


def free_bytes(place: str, device: torch.device, folder: Path) -> int:
    """Bytes that are free in a place; in a container, what its own limit leaves."""
    if place == "disk":
        return shutil.disk_usage(folder).free
    if place == "device" and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def find_room(
    wanted: str, size_bytes: int, device: torch.device, folder: Path, budget_bytes: int | None = None
) -> Room:
    """The first place with room for `size_bytes`.

    Args:
        wanted: "auto" (device, then host, then disk) or one of `PLACES`.
        size_bytes: of the hidden states.
        device: where the model is; on a CPU "device" is "host".
        folder: on the disk that would be used.
        budget_bytes: at most; half of what is free in the place where it is None.

    Raises:
        InputError: there is no room; the message names the last place that was tried.
    """
    names = PLACES if wanted == "auto" else (wanted,)
    for name in names:
        place = "host" if name == "device" and device.type == "cpu" else name
        free = int(free_bytes(place, device, folder) * SHARE)
        room = free if budget_bytes is None else min(budget_bytes, free)
        if size_bytes <= room:
            return Room(place, folder)
    size, limit = (f"{value / 2**20:.0f} MiB" for value in (size_bytes, room))
    raise InputError(
        f"{size} of hidden states are more than the {limit} that may be used ({place}); use another place, or off"
    )


def allocate(shape: tuple[int, int], dtype: torch.dtype, room: Room, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor in a place.

    Raises:
        OSError: the disk is full.
    """
    if room.place == "device":
        return torch.empty(shape, dtype=dtype, device=device)
    if room.place == "host":
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    count = shape[0] * shape[1]
    with tempfile.TemporaryFile(dir=room.folder) as file:
        # It has no name from its first moment on: reserving takes long on some disks, and may be killed.
        # Reserved now: a write to a mapped page of a full disk would end the process without a word.
        os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
        return torch.from_file(f"{OPEN_FILES}/{file.fileno()}", shared=True, size=count, dtype=dtype).view(shape)
