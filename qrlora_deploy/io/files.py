"""Reading and writing files: atomic replacement, digests, and safetensors with one metadata record.

Every file of the project is written in a temporary folder beside its place, flushed to the disk
and renamed, so a reader sees the old file or the new one, never a part.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from qrlora_deploy.errors import InputError, QrloraError, library_errors
from qrlora_deploy.io.arrays import mapped_arrays, save_arrays
from qrlora_deploy.io.outputs import check_file, check_free_folder, check_report_folder
from qrlora_deploy.io.reading import is_file, parse_json, readable
from qrlora_deploy.io.sealing import METADATA_KEY, Allows, check_parts, content_digest, read_record, unsealed
from qrlora_deploy.io.temporary import LOCK, temporary_folder
from qrlora_deploy.io.versions import Versions

TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""What a rename of a folder says where something is there already."""


MAPPED_BYTES = 2**30
"""A file of at least so many is mapped: it may be larger than the memory. Smaller ones are copied, so that nobody who
writes over them changes what was read."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same name; rename it over `path` when the block succeeds.

    On any error the temporary file is removed and an existing `path` is left as it was. A link is
    replaced, not what it leads to. The file gets the mode that the umask gives, whatever wrote it.

    Raises:
        InputError: the folder of `path` does not exist, or `path` is a folder, device, pipe or socket.
        QrloraError: the disk is full or refuses the write.
    """
    check_file(path)
    with writing(path), temporary_folder(path.parent, path.name) as place:
        temporary = place / path.name
        yield temporary
        _settle(place)
        temporary.replace(path)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block succeeds, its files replace those of `folder`, which is
    made if it is missing. On any error all of them are as they were.

    Raises:
        InputError: `folder` or a file is something else, or the parent is missing.
        QrloraError: the disk is full or refuses the write.
    """
    check_report_folder(folder)
    with writing(folder), temporary_folder(folder.parent, folder.name) as place:
        content = place / folder.name
        content.mkdir()
        yield content
        _settle(place)
        files = list(content.iterdir())
        for file in files:
            check_file(folder / file.name, with_parent=False)
        folder.mkdir(exist_ok=True)
        for file in files:
            file.replace(folder / file.name)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder of the same name; rename it to `path` when the block succeeds.

    All files in it get the mode that the umask gives, whatever wrote them. What a dead process left
    of writing the same folder is removed first.

    Raises:
        InputError: `path` exists and is not an empty folder (nothing is ever overwritten), also where
            another process made it meanwhile, or its parent is missing.
        QrloraError: the disk is full or refuses the write.
    """
    check_free_folder(path)
    with writing(path), temporary_folder(path.parent, path.name) as place:
        temporary = place / path.name
        temporary.mkdir()
        yield temporary
        _publish(temporary, place, path)


def publish_folder(made: Path, path: Path) -> None:
    """Rename a folder that is whole, and lies in one that `lock_folder` locked, to `path`, as `atomic_folder` does.

    Raises:
        InputError: `path` exists and is not an empty folder; what was made stays.
        QrloraError: the disk is full or refuses it.
    """
    check_free_folder(path)
    with writing(path):
        _publish(made, made.parent, path)


def _publish(made: Path, place: Path, path: Path) -> None:
    """Flush everything in the locked folder `place`, and rename what was made there to `path`."""
    _settle(place)
    try:
        if path.is_dir():
            path.rmdir()
        made.replace(path)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        raise InputError(f"{path} already exists: another process made it meanwhile") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses within the block into one line that names `path`.

    Raises:
        QrloraError: the disk is full or refuses it.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        # safetensors has no class of its own for a failed write; a damaged file is not read in here.
        raise QrloraError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def _settle(place: Path) -> None:
    """Give everything in a temporary folder the mode that the umask gives, and flush it to the disk.

    Libraries make files for their owner alone. What was made here without them shows what others may get.
    """
    modes = {kind: stat.S_IMODE(path.stat().st_mode) for kind, path in ((True, place), (False, place / LOCK))}
    for path in place.rglob("*"):
        status = path.lstat()
        is_folder = stat.S_ISDIR(status.st_mode)
        if not is_folder and not stat.S_ISREG(status.st_mode):
            continue
        if stat.S_IMODE(status.st_mode) != modes[is_folder]:
            path.chmod(modes[is_folder])
        if not is_folder and path.name != LOCK:
            flush_file(path)


def flush_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Write a safetensors file with one metadata record, atomically and reproducibly.

    The record gains `content_digest`, the SHA-256 of everything else in the file, so that a
    change to a tensor or to the metadata is noticed by `read_tensors`.
    """
    sealed = metadata | {"content_digest": content_digest(tensors, metadata)}
    record = json.dumps(sealed, sort_keys=True, separators=(",", ":"), allow_nan=False)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_file(path) as temporary:
        save_arrays(temporary, contiguous, {METADATA_KEY: record})


def has_format(kind: str) -> Callable[[Path], bool]:
    """A function that says of a file whether `write_tensors` wrote it as a `kind`, by its header alone."""

    def found(path: Path) -> bool:
        try:
            record = stored_record(path)
        except InputError:
            return False
        return isinstance(record, dict) and record.get("format") == kind

    return found


def stored_record(path: Path) -> Any:
    """The metadata record of a file that `write_tensors` wrote, by its header alone; its digest is not checked.

    Raises:
        InputError: it cannot be read, or holds no record.
    """
    with (
        readable(path),
        library_errors(f"{path} is not a safetensors file"),
        safetensors.safe_open(path, framework="np") as file,
    ):
        raw = file.metadata() or {}
    return parse_json(raw.get(METADATA_KEY, ""), f"{path} holds no record")


def read_tensors(
    path: Path,
    kind: str,
    versions: Versions,
    allows: Allows,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file written by `write_tensors`.

    Args:
        path: the file.
        kind: `format` the record must name, such as "qrlora-basis".
        versions: the versions of its record that are read.
        allows: says from (metadata, name, shape) whether a tensor belongs in such a file. It is
            asked before any tensor is read, so a hostile shape takes no memory.

    Returns:
        The tensors by name (fp32 only), those of a file of `MAPPED_BYTES` on the disk until they are looked at, and the
        metadata record, as the current version has it.

    Raises:
        FileFormatError: the file is cut, changed, of another kind or version, or holds anything
            that does not belong there.
        InputError: it cannot be read at all.
    """
    if not is_file(path):
        raise InputError(f"{path}: no such file")
    damaged = f"{path} is not a complete safetensors file"
    with library_errors(damaged), readable(path):
        file = safetensors.safe_open(path, framework="np")
    with file:
        with library_errors(damaged):
            raw = file.metadata()
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            parts = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        metadata = read_record(path, raw, kind, versions)
        check_parts(path, kind, metadata, parts, allows)
        with library_errors(damaged):
            mapped = path.stat().st_size >= MAPPED_BYTES
            tensors = mapped_arrays(path) if mapped else {name: file.get_tensor(name) for name in parts}
    return tensors, unsealed(path, tensors, metadata, versions)
