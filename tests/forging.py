"""Files changed and sealed again, as somebody with this source code could do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from qrlora_deploy.files import METADATA_KEY, write_tensors

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
