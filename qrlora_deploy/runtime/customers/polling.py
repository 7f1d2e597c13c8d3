"""What changed in a folder, found by comparing it with itself: for folders whose system tells nothing."""

import heapq
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Signature = int

NEWEST = 256
"""Entries that are looked at before all others: more hardly change in the seconds before a store starts."""


@dataclass(frozen=True)
class Again:
    """A file to look at again: when its signature changes, or at any rate where that is None.

    Attributes:
        signature: the file's when it was read.
        message: what was wrong with it; empty where nothing was.
        after_s: look at it when `time.monotonic` says this, whatever its signature.
    """

    signature: Signature | None
    message: str = ""
    after_s: float | None = None


def status_of(path: "Path | str") -> os.stat_result | None:
    """The status of what a path leads to; None where it leads nowhere, in a circle, or may not be seen."""
    try:
        # A Path takes much longer, and a folder may have very many entries.
        return os.stat(path)  # noqa: PTH116
    except OSError:
        return None


def signature_of(status: os.stat_result | None) -> Signature | None:
    """Times, size and identity as one number; None where there is nothing.

    An older file that takes the place of a newer one has another signature too.
    """
    if status is None:
        return None
    return hash((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev))


def changed_s(status: os.stat_result) -> float:
    """When a file was last changed or came to its place, in seconds since 1970."""
    return max(status.st_mtime, status.st_ctime)


def newest_first(folder: Path) -> Iterator[str]:
    """Names of a folder's entries, those first that came to their place last: somebody waits for them.

    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    newest = heapq.nlargest(NEWEST, ((_changed_ns(folder, name), name) for name in names))
    first = {name for _, name in newest}
    yield from (name for _, name in newest)
    yield from (name for name in names if name not in first)


def _changed_ns(folder: Path, name: str) -> int:
    status = status_of(f"{folder}{os.sep}{name}")
    return 0 if status is None else max(status.st_mtime_ns, status.st_ctime_ns)


class FolderPoller:
    """The entries of a folder and their signatures, about 0.2 kB each. For one thread.

    An entry that leads nowhere or in a circle is an entry like any other and hinders none.

    Raises:
        OSError: the folder cannot be listed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, Signature | None] = {}
        self.changed()

    def changed(self) -> set[str]:
        """Names of entries that are new, gone, or other than the last time."""
        seen, changed, count = self._seen, set(), 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                count += 1
                signature = signature_of(status_of(entry.path))
                # Not `get` alone: an entry that leads nowhere has None.
                if entry.name not in seen or seen[entry.name] != signature:
                    seen[entry.name] = signature
                    changed.add(entry.name)
        if count != len(seen):
            gone = [name for name in seen if not os.path.lexists(self._folder / name)]
            for name in gone:
                del seen[name]
            changed.update(gone)
        return changed
