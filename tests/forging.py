"""Files changed and sealed again, as somebody with this source code could do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from qrlora_deploy.io.files import write_tensors
from qrlora_deploy.io.sealing import METADATA_KEY
from qrlora_deploy.runtime.bundle.bundle import digest_files

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], Any]


def forge(source: Path, path: Path, change: Change) -> Path:
    """Write `source` to `path` with its metadata and tensors changed, under a digest that is right."""
    with safetensors.safe_open(source, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = json.loads(file.metadata()[METADATA_KEY])
    metadata.pop("content_digest")
    change(metadata, tensors)
    write_tensors(path, tensors, metadata)
    return path


def reseal(folder: Path, **changes: object) -> None:
    """Give a bundle's manifest the digests of its files as they are, and `changes` in its fields."""
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    record["files"] = digest_files(folder)
    path.write_text(json.dumps(record | changes))
