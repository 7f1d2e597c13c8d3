"""Temporary folders that tell whether their process still lives.

A file or a folder is made inside a temporary folder beside its place and moved there when it is
whole. The temporary folder holds a file that stays locked while its process lives, however that
ends: what carries no lock was left by a dead process, and the next run removes it. A number of a
process would say less: numbers are used again, and those of another machine or container mean nothing here.
"""

import atexit
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

try:
    import fcntl

    HAS_LOCKS = True
except ImportError:  # Windows: nothing is locked there, and nothing of others is removed
    HAS_LOCKS = False

LOCK = "lock"
LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part", re.DOTALL)
"""Name of a temporary folder: that of what is made in it, and a random number."""

SCRATCH = "qrlora-deploy"
LONGEST_NAME = 200
"""Bytes; most file systems take 255 in all."""

FOREIGN_SECONDS = 24 * 3600.0
"""So long a folder of another machine must have been still: some network folders keep locks from other machines."""

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
ATTEMPTS = 100
RETRY_S = 0.02

_live: set[Path] = set()


@contextmanager
def temporary_folder(parent: Path, name: str, mode: int = 0o777) -> Iterator[Path]:
    """Yield a new folder in `parent` with a locked file in it; it is removed at the end, whatever happened.

    Args:
        parent: on the disk of what is made.
        name: of what is made.
        mode: of the folder, less what the umask takes.

    Raises:
        OSError: the disk is full or refuses it.
    """
    tried: list[Path] = []
    descriptor = -1
    try:
        descriptor = _make(parent, _label(name), mode, tried)
        yield tried[-1]
    finally:
        with unlocked(descriptor):
            for folder in tried:
                remove_tree(folder)
                _live.discard(folder)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder for this user alone among the system's temporary files; it is removed at the end."""
    place = Path(tempfile.gettempdir())
    _clean_scratch(place)
    with temporary_folder(place, SCRATCH, 0o700) as folder:
        yield folder


@cache
def _clean_scratch(place: Path) -> None:
    # Once in a process: the system's folder may be large.
    remove_dead(place, {SCRATCH})


def _label(name: str) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= LONGEST_NAME else hashlib.sha256(encoded).hexdigest()


def _make(parent: Path, label: str, mode: int, tried: list[Path]) -> int:
    """Make a folder and lock it; returns the open file. Every folder that is made is added to `tried` before."""
    for _ in range(ATTEMPTS):
        folder = parent / f".{label}.{secrets.token_hex(4)}.part"
        _live.add(folder)
        tried.append(folder)
        folder.mkdir(mode)
        # It may be swept as long as it is empty, or its lock is.
        with suppress(FileNotFoundError):
            descriptor = lock_folder(folder)
            if descriptor is not None:
                return descriptor
    raise OSError(errno.EBUSY, "no temporary folder could be locked", str(parent))


def lock_folder(folder: Path) -> int | None:
    """Lock a folder by a file in it until the file is closed, at the latest when this process ends.

    Returns:
        The open file; None where another process holds the lock.

    Raises:
        OSError: the folder refuses it.
    """
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    # Whoever removes a dead process's folder may have had the lock, and the file, between these lines.
    if _take(descriptor) is not False and _is_there(path, descriptor):
        os.truncate(descriptor, 0)
        os.write(descriptor, "\n".join(_machine()).encode())
        return descriptor
    os.close(descriptor)
    return None


def open_locked(path: Path) -> IO[bytes] | None:
    """Open a file, to be read and to be added to, and lock it until it is closed; None where another process holds it.

    Raises:
        OSError: the disk is full or refuses it.
    """
    for _ in range(ATTEMPTS):
        file = path.open("a+b")
        if _take(file.fileno()) is False:
            file.close()
            return None
        # Whoever had the lock may have removed the file, or given it another name, between these lines.
        if _is_there(path, file.fileno()):
            return file
        file.close()
    return None


@contextmanager
def unlocked(descriptor: int) -> Iterator[None]:
    """Give up a lock after the block, which removes its folder; before it where open files cannot be removed."""
    if descriptor >= 0 and not HAS_LOCKS:
        os.close(descriptor)
    try:
        yield
    finally:
        if descriptor >= 0 and HAS_LOCKS:
            os.close(descriptor)


def _take(descriptor: int) -> bool | None:
    """Lock an open file: whether that worked, or None where locks are unknown."""
    if not HAS_LOCKS:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise
    return True


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


@cache
def _machine() -> tuple[str, ...]:
    """Names of this machine: its own, and that of the running kernel, which containers share."""
    names = [platform.node()]
    with suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    return tuple(filter(None, names))


def remove_dead(parent: Path, names: Iterable[str]) -> None:
    """Remove what dead processes left in `parent` of making files or folders called `names`.

    What a live process is making stays, and so does what this process may not remove.
    """
    remove_dead_where(parent, set(map(_label, names)).__contains__)


def remove_dead_where(parent: Path, wanted: Callable[[str], bool]) -> None:
    """`remove_dead` of every name of which `wanted` says so; names of more than `LONGEST_NAME` bytes are hashed."""
    with suppress(OSError), os.scandir(parent) as entries:
        found = [Path(entry.path) for entry in entries if _belongs(entry, wanted)]
        for folder in found:
            with suppress(OSError):
                remove_if_dead(folder)


def _belongs(entry: "os.DirEntry[str]", wanted: Callable[[str], bool]) -> bool:
    match = LEFTOVER.fullmatch(entry.name)
    return match is not None and wanted(match[1]) and entry.is_dir(follow_symlinks=False)


def remove_if_dead(folder: Path) -> bool:
    """Remove a folder that `lock_folder` locked, where its process is dead; returns whether it was.

    Raises:
        OSError: the folder refuses it.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        # Of a process that died before it locked it; a live one at that step makes another.
        with suppress(OSError):
            folder.rmdir()
            return True
        # Its lock went first: somebody is removing it, or died of it.
        dead = _is_still(folder)
        if dead:
            remove_tree(folder)
        return dead
    try:
        dead = _take(descriptor) is True and (_is_of_here(descriptor) or _is_still(folder))
        if dead:
            remove_tree(folder)
        return dead
    finally:
        os.close(descriptor)


def _is_of_here(descriptor: int) -> bool:
    """Whether a lock was written on this machine, or by a process that died before it wrote anything."""
    names = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").splitlines()
    return not names or not set(names).isdisjoint(_machine())


def _is_still(folder: Path) -> bool:
    newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    return time.time() - newest > FOREIGN_SECONDS


def remove_tree(folder: Path) -> None:
    """Remove a folder, its lock last, and finish that when a signal asks to stop meanwhile.

    Where something in it cannot be removed its lock stays, by which the next run knows the folder for dead.
    """
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            _remove(folder)
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _remove(folder: Path) -> None:
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name != LOCK and stat.S_ISDIR(path.lstat().st_mode):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                with suppress(OSError):
                    path.unlink()
    with suppress(OSError):
        if all(path.name == LOCK for path in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)


def remove_live() -> None:
    """Remove every temporary folder of this process, which must end right afterwards.

    Another thread may still write into one, so each is tried more than once. At the end of a process, too: an
    exception that comes in the middle of cleaning up, as a signal's does, leaves a folder behind.
    """
    for folder in list(_live):
        for _ in range(ATTEMPTS):
            remove_tree(folder)
            if not os.path.lexists(folder):
                break
            time.sleep(RETRY_S)
        _live.discard(folder)


atexit.register(remove_live)
if hasattr(os, "register_at_fork"):
    # What the parent makes is not the child's to remove.
    os.register_at_fork(after_in_child=_live.clear)
