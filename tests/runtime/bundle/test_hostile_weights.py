"""Weights that a sealed model looks for elsewhere: refused in one line, and the process lives."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.running import environment
from tests.forging import reseal

onnx = pytest.importorskip("onnx", reason="forges graphs by the onnx package")

OPEN_ALL = """
import json, sys
from pathlib import Path
from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime import Predictor, open_bundle

for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        outcome = Predictor(open_bundle(folder), threads=1).predict(["play some music"])[0].logits
    except QrloraError as error:
        outcome = str(error)
    print(json.dumps([folder.name, outcome]), flush=True)
"""

Entries = dict[str, str]
ENTRIES: dict[str, Entries] = {
    "offset at the end": {"offset": "SIZE"},
    "offset behind the end": {"offset": "4096000"},
    "offset of 63 bits": {"offset": str(2**63 - 1)},
    "offset of 65 bits": {"offset": str(2**64)},
    "offset below zero": {"offset": "-64"},
    "offset that is no number": {"offset": "ten"},
    "offset that is empty": {"offset": ""},
    "length behind the end": {"length": "4096000"},
    "length of 63 bits": {"length": str(2**63 - 1)},
    "length below zero": {"length": "-1"},
    "length of nothing": {"length": "0"},
    "length that is no number": {"length": "ten"},
    "length too small": {"length": "4"},
    "offset and length that add up to nothing": {"offset": str(2**63 - 64), "length": str(2**63)},
    "a file that is no weights": {"location": "config.json"},
    "a file that is the model": {"location": "model.onnx"},
    "a file that is the manifest": {"location": "manifest.json"},
    "a folder": {"location": "."},
    "a way around": {"location": "./model.onnx.data"},
    "a way out": {"location": "../secret"},
    "a way out and in": {"location": "sub/../../secret"},
    "a place on this machine": {"location": "/etc/passwd"},
    "a folder that is a link": {"location": "link/model.onnx.data"},
}


DIMENSIONS = (0, 1, 2**20, 2**40, 2**62, -1)


def point_weights(folder: Path, entries: Entries, dimension: int | None = None) -> None:
    """Let the largest tensor of the model, an embedding, lie where `entries` say, under right seals."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)) if tensor.external_data else 0)
    size = (folder / "model.onnx.data").stat().st_size
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value).replace("SIZE", str(size))
    if dimension is not None:
        tensor.dims[0] = dimension
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)


@pytest.fixture(scope="module")
def outcomes(switchable: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The logits or the error of every such bundle, from one process of its own, which ends well."""
    folders = tmp_path_factory.mktemp("external")
    for name in ("untouched", *ENTRIES, *map(str, DIMENSIONS)):
        shutil.copytree(switchable, folders / name)
    # What `../secret` would give, were it followed; it is no bundle itself.
    shutil.copy(switchable / "model.onnx.data", folders / "secret")
    (folders / "a folder that is a link" / "link").symlink_to(switchable, target_is_directory=True)
    for name, entries in ENTRIES.items():
        point_weights(folders / name, entries)
    for dimension in DIMENSIONS:
        point_weights(folders / str(dimension), {}, dimension)
    ran = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, str(folders)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.returncode} {ran.stdout} {ran.stderr}"  # a signal would be below zero
    return dict(json.loads(line) for line in ran.stdout.splitlines())


HARMLESS = ("length of nothing",)
"""ONNX Runtime takes this for a length that is not given."""

ANOTHER_MODEL = ("a file that is the model",)
"""Bytes enough under a right seal: weights like any others. `verify` would not let them pass."""


def assert_outcome(found: Any, expected: Any, name: str) -> None:
    if name in HARMLESS:
        assert found == expected
    elif name not in ANOTHER_MODEL:
        assert isinstance(found, str) and found.isprintable() and len(found) < 2000, found


@pytest.mark.parametrize("name", ENTRIES)
def test_weights_that_lie_elsewhere_are_refused_and_the_process_lives(outcomes: dict[str, Any], name: str) -> None:
    assert isinstance(outcomes["untouched"], list)
    assert_outcome(outcomes[name], outcomes["untouched"], name)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_weights_of_another_size_are_refused_and_the_process_lives(outcomes: dict[str, Any], dimension: int) -> None:
    assert_outcome(outcomes[str(dimension)], outcomes["untouched"], str(dimension))
