"""Reading and writing files: atomic replacement, digests, and safetensors with one metadata record.

Every file of the project is written to a temporary name in its own folder, flushed to the disk
and renamed, so a reader sees the old file or the new one, never a part.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from qrlora_deploy.errors import FileFormatError, InputError, QrloraError, library_errors
from qrlora_deploy.reading import check_version, is_file, parse_json, readable

METADATA_KEY = "qrlora"
"""All metadata is one JSON text under one key: safetensors keeps no order between keys, and
with a single one the same content gives the same bytes."""

MAX_METADATA_BYTES = 16 * 2**20

LEFTOVER = re.compile(r"\.(.+)\.[0-9]+\.tmp")
"""Temporary name of a file that `atomic_file` writes: the file's own, and the process."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` when the block succeeds.

    On any error the temporary file is removed and an existing `path` is left as it was.

    Raises:
        InputError: the folder of `path` does not exist or `path` is a folder.
        QrloraError: the disk is full or refuses the write.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    except OSError as error:
        raise QrloraError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: Container[str]) -> None:
    """Remove what a killed process left in `folder` of writing files called `names` by `atomic_file`.

    For files that nobody else is writing.

    Raises:
        InputError: the folder refuses it.
    """
    try:
        for file in folder.iterdir():
            match = LEFTOVER.fullmatch(file.name)
            if match is not None and match[1] in names:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be removed: {error.strerror or error}") from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; rename it to `path` when the block succeeds.

    Raises:
        InputError: `path` exists and is not an empty folder (nothing is ever overwritten), or its
            parent is missing.
        QrloraError: the disk is full or refuses the write.
    """
    check_free_folder(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        temporary.chmod(0o755)
        if path.is_dir():
            path.rmdir()
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        # safetensors has no class of its own for a failed write; a damaged file is not read in here.
        raise QrloraError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free_folder(path: Path) -> None:
    """Refuse an output folder that already holds something or cannot be made.

    Raises:
        InputError: saying which.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} already exists; remove it or give another --output")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")


def check_free_file(path: Path) -> None:
    """Refuse an output file whose folder is missing before long work starts.

    Raises:
        InputError: saying which.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: give a file in a folder that exists")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each array, in the order given."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}:{array.dtype.str}:{array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Write a safetensors file with one metadata record, atomically and reproducibly.

    The record gains `content_digest`, the SHA-256 of everything else in the file, so that a
    change to a tensor or to the metadata is noticed by `read_tensors`.
    """
    sealed = metadata | {"content_digest": _content_digest(tensors, metadata)}
    record = json.dumps(sealed, sort_keys=True, separators=(",", ":"), allow_nan=False)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_file(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(contiguous, {METADATA_KEY: record}))


def read_tensors(
    path: Path,
    kind: str,
    version: int,
    allows: Callable[[dict[str, Any], str, tuple[int, ...]], bool],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file written by `write_tensors`.

    Args:
        path: the file.
        kind: `format` the record must name, such as "qrlora-basis".
        version: the `format_version` that is understood.
        allows: says from (metadata, name, shape) whether a tensor belongs in such a file. It is
            asked before any tensor is read, so a hostile shape takes no memory.

    Returns:
        The tensors by name (fp32 only) and the metadata record.

    Raises:
        FileFormatError: the file is cut, changed, of another kind or version, or holds anything
            that does not belong there. InputError: it cannot be read at all.
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
        metadata = _read_record(path, raw, kind, version)
        for name, (dtype, shape) in parts.items():
            if dtype != "F32" or not allows(metadata, name, shape):
                raise FileFormatError(f"{path}: unexpected tensor {name!r} {dtype}{list(shape)} in a {kind} file")
        with library_errors(damaged):
            tensors = {name: file.get_tensor(name) for name in parts}
    expected = metadata.pop("content_digest", None)
    if expected != _content_digest(tensors, metadata):
        raise FileFormatError(f"{path} was changed after it was written: its content digest does not fit")
    return tensors, metadata


def _read_record(path: Path, raw: dict[str, str] | None, kind: str, version: int) -> dict[str, Any]:
    wrong = f"{path} is not a {kind} file"
    text = (raw or {}).get(METADATA_KEY, "")
    if len(raw or {}) != 1 or len(text) > MAX_METADATA_BYTES:
        raise FileFormatError(wrong)
    metadata = parse_json(text, wrong)
    if not isinstance(metadata, dict) or metadata.get("format") != kind:
        raise FileFormatError(wrong)
    check_version(path, metadata.get("format_version"), version)
    return metadata


def _content_digest(tensors: Mapping[str, np.ndarray], metadata: dict[str, Any]) -> str:
    record = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    ordered = {name: tensors[name] for name in sorted(tensors)}
    return hashlib.sha256((record + digest_arrays(ordered)).encode()).hexdigest()
