"""What changed in a folder, found by comparing it with itself: for folders whose system tells nothing."""

import heapq
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

Signature = int

NEWEST = 256
"""Entries that are looked at before all others: more hardly change in the seconds before a store starts."""

STEP = 1000
"""Entries whose status is asked for in one go, which takes a few milliseconds on a local disk."""


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

    Now and then an empty name comes before them: in a large folder they take a while to find, and who asks may
    have something better to do.

    Raises:
        OSError: the folder cannot be listed.
    """
    # A Path of each takes much longer.
    names = os.listdir(folder)  # noqa: PTH208
    newest: list[tuple[int, str]] = []
    for start in range(0, len(names), STEP):
        some = ((_changed_ns(folder, name), name) for name in names[start : start + STEP])
        newest = heapq.nlargest(NEWEST, [*newest, *some])
        yield ""
    first = {name for _, name in newest}
    yield from (name for _, name in newest)
    yield from (name for name in names if name not in first)


def _changed_ns(folder: Path, name: str) -> int:
    status = status_of(f"{folder}{os.sep}{name}")
    return 0 if status is None else max(status.st_mtime_ns, status.st_ctime_ns)


class FolderPoller:
    """The entries of a folder and their signatures, about 0.3 kB each. For one thread.

    An entry that leads nowhere or in a circle is an entry like any other and hinders none.

    Raises:
        OSError: the folder cannot be listed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, tuple[int, Signature | None]] = {}
        self._listed: Signature | None = None
        self.changed()

    def changed(self) -> set[str]:
        """Names of entries that are new, gone, or other than the last time."""
        return set().union(*self.steps())

    def steps(self) -> Iterator[set[str]]:
        """`changed` in short steps, between which the caller may rest.

        What came, went or was replaced is found by a listing alone, a small part of the work. So the folder is
        listed first, and once more before each step where its own times say that something was.
        """
        yield self._list()
        names = iter(list(self._seen))
        while some := list(islice(names, STEP)):
            came = self._list() if self._signature() != self._listed else set()
            yield came | self._compare(some)

    def _signature(self) -> Signature | None:
        return signature_of(status_of(self._folder))

    def _list(self) -> set[str]:
        """Names that came, went or lead to another file, by the number that a listing tells of each."""
        seen, changed, count = self._seen, set(), 0
        # Before the listing: what changes meanwhile may be missing in it.
        self._listed = self._signature()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                count += 1
                known, number = seen.get(entry.name), entry.inode()
                if known is None or known[0] != number:
                    signature = signature_of(status_of(entry.path))
                    seen[entry.name] = number, signature
                    if known is None or known[1] != signature:
                        changed.add(entry.name)
        if count != len(seen):
            gone = seen.keys() - set(os.listdir(self._folder))  # noqa: PTH208
            for name in gone:
                del seen[name]
            changed |= gone
        return changed

    def _compare(self, names: Sequence[str]) -> set[str]:
        """Those of these names whose status is another one."""
        changed = set()
        for name in names:
            known = self._seen.get(name)
            signature = signature_of(status_of(f"{self._folder}{os.sep}{name}"))
            if known is not None and known[1] != signature:
                self._seen[name] = known[0], signature
                changed.add(name)
        return changed
