"""A safetensors file that was read already, such as one that somebody sent: nothing of it is written or mapped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from qrlora_deploy.errors import library_errors
from qrlora_deploy.io.files import METADATA_KEY, Allows, check_parts, read_record, unsealed
from qrlora_deploy.io.versions import Versions

HEADER = 8
"""Bytes before the header of a safetensors file: its length."""


def read_tensors_content(
    content: bytes, path: Path | str, kind: str, versions: Versions, allows: Allows
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """As `files.read_tensors`, from the content of a file; `path` is what messages call it."""
    with library_errors(f"{path} is not a complete safetensors file"):
        found = dict(safetensors.deserialize(content))
        header = json.loads(content[HEADER : HEADER + int.from_bytes(content[:HEADER], "little")])
        parts = {name: (part["dtype"], tuple(part["shape"])) for name, part in found.items()}
    metadata = read_record(path, header.get("__metadata__"), kind, versions)
    check_parts(path, kind, metadata, parts, allows)
    tensors = {name: np.frombuffer(found[name]["data"], "<f4").reshape(shape) for name, (_, shape) in parts.items()}
    return tensors, unsealed(path, tensors, metadata, versions, header["__metadata__"][METADATA_KEY])
