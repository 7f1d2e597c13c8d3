"""Which files hold a checkpoint's weights, and what their headers say; no weight is read.

One choice for every command, and the one that transformers makes: a single file comes before shards.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from qrlora_deploy.errors import FileFormatError, InputError, library_errors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

BLOCK_BYTES = 2**22
"""Read at once where bytes are only hashed."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by the header of its file.

    Attributes:
        file: that holds it.
        shape: as it is stored.
        dtype: name by safetensors, such as "F32".
        start: where its bytes begin in the file.
        size_bytes: how many there are.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    size_bytes: int

    @property
    def quantised(self) -> bool:
        """Whether it is no plain number of 16 bits or more."""
        return self.dtype not in ("F64", "F32", "F16", "BF16")

    def digest(self) -> str:
        """SHA-256 of the stored bytes.

        Raises:
            FileFormatError: the file became shorter since its header was read.
        """
        found, left = hashlib.sha256(), self.size_bytes
        with self.file.open("rb") as file:
            file.seek(self.start)
            while left:
                block = file.read(min(left, BLOCK_BYTES))
                if not block:
                    raise FileFormatError(f"{self.file} is cut: it became shorter while it was read")
                found.update(block)
                left -= len(block)
        return found.hexdigest()


def digest_of(digests: Mapping[str, str]) -> str:
    """The digest of a checkpoint: SHA-256 over the digests of all tensors, in order of their names."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}:{digests[name]}\n".encode())
    return whole.hexdigest()


def used_index(folder: Path) -> Path | None:
    """The index that names the shards of `folder`; None where a single file holds the weights.

    An index beside a single file is left over from an earlier save, and nobody reads it.
    """
    index = folder / INDEX
    return index if index.is_file() and not (folder / SINGLE).is_file() else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order of their names.

    Raises:
        InputError: there are none, a shard is missing or outside the folder, or an adapter lies beside them.
        FileFormatError: the index is damaged.
    """
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder} holds {ADAPTER}: transformers would load the adapter and the base that it names; "
            f"merge it into the weights, or move it away"
        )
    index = used_index(folder)
    if index is not None:
        return _shards(index)
    if not (folder / SINGLE).is_file():
        raise InputError(f"{folder} holds no {SINGLE}; only safetensors checkpoints are read")
    return [folder / SINGLE]


def _shards(index: Path) -> list[Path]:
    with library_errors(f"{index} is damaged"):
        content = json.loads(index.read_text(encoding="utf-8"))
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise FileFormatError(f"{index} is damaged: weight_map must name the file of each tensor")
    names = sorted(set(places.values()))
    wrong = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if wrong or not names:
        raise InputError(f"{index} names files that are not there: {', '.join(wrong) or 'it names none'}")
    return [index.parent / name for name in names]


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of `files` by its name.

    Raises:
        InputError: a file cannot be read.
        FileFormatError: it is damaged.
    """
    found = {}
    for file in files:
        check_readable(file)
        with library_errors(f"{file} is not a complete safetensors file"):
            # Opened for its checks: from here on the header is known to fit the file.
            with safetensors.safe_open(file, "np"):
                pass
            start, header = _header(file)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            found[name] = StoredTensor(file, tuple(entry["shape"]), entry["dtype"], start + first, last - first)
    return found


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and what its header says of each."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def check_readable(file: Path) -> None:
    """Say why a file cannot be opened; safetensors says of each reason that there is no such file.

    Raises:
        InputError: with the reason of the system.
    """
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
