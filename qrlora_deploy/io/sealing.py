"""What makes a safetensors file one of the project's: one metadata record, whose digest seals the content."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qrlora_deploy.errors import FileFormatError
from qrlora_deploy.io.reading import parse_json
from qrlora_deploy.io.versions import Versions

METADATA_KEY = "qrlora"
"""All metadata is one JSON text under one key: safetensors keeps no order between keys, and
with a single one the same content gives the same bytes."""


MAX_METADATA_BYTES = 16 * 2**20


Allows = Callable[[dict[str, Any], str, tuple[int, ...]], bool]
"""Says from (metadata, name, shape) whether a tensor belongs in a file."""


def read_record(path: Path | str, raw: dict[str, str] | None, kind: str, versions: Versions) -> dict[str, Any]:
    """The record of a file from its safetensors metadata, of a version that is read."""
    wrong = f"{path} is not a {kind} file"
    text = (raw or {}).get(METADATA_KEY, "")
    if len(raw or {}) != 1 or len(text) > MAX_METADATA_BYTES:
        raise FileFormatError(wrong)
    metadata = parse_json(text, wrong)
    if not isinstance(metadata, dict) or metadata.get("format") != kind:
        raise FileFormatError(wrong)
    versions.check(path, metadata.get("format_version"))
    return metadata


def check_parts(
    path: Path | str, kind: str, metadata: dict[str, Any], parts: dict[str, tuple[str, tuple[int, ...]]], allows: Allows
) -> None:
    """Refuse tensors, dtype and shape by name, that do not belong in a file of this kind."""
    for name, (dtype, shape) in parts.items():
        if dtype != "F32" or not allows(metadata, name, shape):
            raise FileFormatError(f"{path}: unexpected tensor {name!r} {dtype}{list(shape)} in a {kind} file")


def unsealed(
    path: Path | str, tensors: Mapping[str, np.ndarray], metadata: dict[str, Any], versions: Versions, text: str = ""
) -> dict[str, Any]:
    """The record of today, of a file whose content is what its digest says; `text` is the record as it was read."""
    expected = metadata.pop("content_digest", None)
    # As it was written, but for the digest: to write the record again takes much longer.
    written = text.replace(f'"content_digest":"{expected}",', "", 1)
    if expected != text_digest(tensors, written) and expected != content_digest(tensors, metadata):
        raise FileFormatError(f"{path} was changed after it was written: its content digest does not fit")
    return versions.upgraded(path, metadata, f"{path} is incomplete or damaged")


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each array, in the order given."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}:{array.dtype.str}:{array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def content_digest(tensors: Mapping[str, np.ndarray], metadata: dict[str, Any]) -> str:
    return text_digest(tensors, json.dumps(metadata, sort_keys=True, separators=(",", ":")))


def text_digest(tensors: Mapping[str, np.ndarray], record: str) -> str:
    ordered = {name: tensors[name] for name in sorted(tensors)}
    return hashlib.sha256((record + digest_arrays(ordered)).encode()).hexdigest()
