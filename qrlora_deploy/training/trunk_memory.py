"""Where hidden states are kept: device, host memory or disk, each within a bound."""

import os
import shutil
import tempfile
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from qrlora_deploy.errors import InputError

PLACES = ("device", "host", "disk")
SHARE = 0.5
"""Of what is free, at most: the rest is for training itself and for others."""

CGROUP = Path("/sys/fs/cgroup")


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


def choose_place(
    wanted: str, size_bytes: int, device: torch.device, folder: Path, budget_bytes: int | None = None
) -> str | None:
    """The first place with room for `size_bytes`.

    Args:
        wanted: "auto" (device, then host, then disk) or one of `PLACES`.
        size_bytes: of the hidden states.
        device: where the model is; on a CPU "device" is "host".
        folder: on the disk that would be used.
        budget_bytes: at most; half of what is free in the place where it is None.

    Returns:
        The place, or None where "auto" finds no room.

    Raises:
        InputError: the place that was asked for has no room.
    """
    names = PLACES if wanted == "auto" else (wanted,)
    for name in names:
        place = "host" if name == "device" and device.type == "cpu" else name
        free = int(free_bytes(place, device, folder) * SHARE)
        room = free if budget_bytes is None else min(budget_bytes, free)
        if size_bytes <= room:
            return place
    if wanted == "auto":
        return None
    size, limit = (f"{value / 2**20:.0f} MiB" for value in (size_bytes, room))
    raise InputError(
        f"--trunk-cache {wanted}: {size} of hidden states are more than the {limit} that may be used there; "
        "use auto, another place, or off"
    )


def allocate(
    shape: tuple[int, int], dtype: torch.dtype, place: str, device: torch.device, folder: Path | None = None
) -> torch.Tensor:
    """An uninitialised tensor in a place.

    Raises:
        OSError: the disk is full.
    """
    if place == "device":
        return torch.empty(shape, dtype=dtype, device=device)
    if place == "host":
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    count = shape[0] * shape[1]
    descriptor, name = tempfile.mkstemp(prefix=".trunk-", dir=folder)
    try:
        # Reserved now: a write to a mapped page of a full disk would end the process without a word.
        os.posix_fallocate(descriptor, 0, max(1, count * dtype.itemsize))
        return torch.from_file(name, shared=True, size=count, dtype=dtype).view(shape)
    finally:
        os.close(descriptor)
        Path(name).unlink()
