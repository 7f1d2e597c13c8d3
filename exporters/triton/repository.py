"""A model repository for Triton: the graph, a per-row bundle, and the front, which has the rest of that bundle."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exporters.onnx.export import export_per_row
from exporters.onnx.options import OnnxOptions
from exporters.triton.config_text import config_text
from exporters.triton.configs import front_config, graph_config
from exporters.triton.options import TritonOptions
from qrlora_deploy.errors import FileFormatError, InputError, argument
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.io.files import atomic_folder
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.runtime.bundle.bundle import (
    MANIFEST_FILE,
    REFERENCE_FILE,
    Manifest,
    is_graph_file,
    open_bundle,
)
from qrlora_deploy.runtime.verification.parity import read_reference

VERSION = "1"
CONFIG, MODEL, WARM_UP = "config.pbtxt", "model.py", "warmup"
SUFFIX = "_graph"

MODEL_TEXT = '''"""Texts in, the answers of any customer in any row out; needs `pip install 'qrlora-deploy[cpu]'`."""

import triton_python_backend_utils
from qrlora_deploy.serving.triton.front import Front


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args):
        """Open the folder of this version, and the customers that config.pbtxt names."""
        self.front = Front(triton_python_backend_utils, args)

    async def execute(self, requests):
        """A response for each request."""
        return await self.front.execute(requests)

    def finalize(self):
        """Watch the customers no more."""
        self.front.close()
'''

CASE = "single text"
"""Of the reference: the row that the graph is warmed up with."""


def export_repository(job: ExportJob, options: TritonOptions) -> Mapping[str, Any]:
    """Write the repository to the new folder `job.output`; its graph agrees with PyTorch, or nothing is left.

    Raises:
        InputError: the base is a decoder, which writes text. Else as `export_per_row`.
    """
    if job.checkpoint.writes_text:
        left_out = argument("format", "triton")
        raise InputError(f"{job.checkpoint.name} is a decoder, which writes text; leave out {left_out}")
    check_free_folder(job.output)
    with atomic_folder(job.output) as folder:
        version = folder / options.graph_name / VERSION
        version.parent.mkdir()
        graph_options = OnnxOptions(
            head_labels=options.head_labels,
            precision=options.precision,
            data=options.data,
            provider=options.provider,
            task=options.task,
        )
        manifest = export_per_row(replace(job, output=version), graph_options)
        _write_config(version.parent, graph_config(manifest, options, _write_warm_up(version)))
        _write_front(folder / options.name, version, manifest, options)
    record = manifest.model_dump(mode="json")
    return record | {"kind": "triton", "models": [options.name, options.graph_name]}


def open_repository(folder: Path) -> Path:
    """The version folder of the graph in a repository, which is a bundle, once the front was found to belong to it.

    Raises:
        InputError: there is no such repository. FileFormatError: the front has other files than the graph's bundle.
    """
    graphs = sorted(folder.glob(f"*{SUFFIX}/{VERSION}/{MANIFEST_FILE}"))
    if len(graphs) != 1:
        raise InputError(f"{folder} is no model repository of this exporter: it holds {len(graphs)} graphs, not one")
    version = graphs[0].parent
    front = folder / version.parent.name.removesuffix(SUFFIX) / VERSION
    if not (front / MANIFEST_FILE).is_file() or not (front / MODEL).is_file():
        raise InputError(f"{folder} is no model repository of this exporter: {front} is not the front of its graph")
    if open_bundle(front, graph=False).manifest != open_bundle(version).manifest:
        raise FileFormatError(f"{front} is the front of another graph than {version}; export both again")
    return version


def _write_front(folder: Path, version: Path, manifest: Manifest, options: TritonOptions) -> None:
    """The model that takes texts: all files of the bundle but the graph's, since folders may lie apart when served."""
    own = folder / VERSION
    own.mkdir(parents=True)
    for name in (*manifest.files, MANIFEST_FILE):
        if not is_graph_file(name):
            shutil.copyfile(version / name, own / name)
    (own / MODEL).write_text(MODEL_TEXT, encoding="utf-8")
    _write_config(folder, front_config(manifest, options))


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / CONFIG).write_text(config_text(config), encoding="utf-8")


def _write_warm_up(version: Path) -> dict[str, int]:
    """A row of the reference as Triton reads it: little-endian numbers, a file an input; returns its tokens."""
    case = next(case for case in read_reference(version / REFERENCE_FILE) if case.name == CASE)
    place = version.parent / WARM_UP
    place.mkdir()
    for name, array in case.inputs.items():
        (place / name).write_bytes(np.ascontiguousarray(array[:1]).astype(array.dtype.newbyteorder("<")).tobytes())
    return {name: array.shape[1] for name, array in case.inputs.items()}
