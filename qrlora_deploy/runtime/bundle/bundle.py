"""The bundle: a folder that holds a model, its tokenizer and a manifest that seals both."""

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qrlora_deploy.errors import FileFormatError, InputError, MalformedInputError
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.io.reading import is_file, parse_json, read_text
from qrlora_deploy.io.strict import from_json
from qrlora_deploy.runtime.bundle.external_data import external_locations
from qrlora_deploy.runtime.bundle.manifest import VERSIONS, Manifest
from qrlora_deploy.runtime.bundle.manifest_checks import manifest_problems
from qrlora_deploy.runtime.bundle.manifest_parts import ParityRecord, TargetRecord, TensorRecord
from qrlora_deploy.runtime.bundle.packed_inputs import BORDERS, PACKED_INPUTS, packed_axes
from qrlora_deploy.runtime.bundle.row_layout import BASE_HEAD_FILE, CUSTOMER_INPUTS, TABLE
from qrlora_deploy.runtime.bundle.sealed_facts import CONFIG_FILE, REFERENCE_FILE

__all__ = [
    "CONFIG_FILE",
    "REFERENCE_FILE",
    "Bundle",
    "Manifest",
    "ParityRecord",
    "TargetRecord",
    "TensorRecord",
    "check_graph",
    "check_no_decoder",
    "digest_files",
    "is_graph_file",
    "open_bundle",
]

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
PACKED_FILE = "packed.onnx"
"""A second graph of the same weights, for CUDA, whose attention takes packed tokens: for right-padded batches."""

MERGE_FILE = "merge.onnx"
"""Makes the merged weights of a customer of a switchable bundle from his row of the table."""

ALONE_FILE = "alone.onnx"
"""Answers batches of one customer, whose merged weights are inputs; of packed tokens where there is a packed graph."""

GRAPHS = (MODEL_FILE, PACKED_FILE, MERGE_FILE, ALONE_FILE)

WEIGHTS_FILE = "model.onnx.data"
TOKENIZER_FILE = "tokenizer.json"
NEEDED = (MODEL_FILE, REFERENCE_FILE, TOKENIZER_FILE, CONFIG_FILE)

MAX_MANIFEST_BYTES = 16 * 2**20
MAX_SHOWN = 120
"""Characters of a name or a reason in a message."""
MAX_GRAPH_BYTES = 2**31 - 1
"""Protobuf's own limit for one message."""

IS_LINK = "is a link"
LINKS = (
    "as in the hub's cache; a bundle holds files alone. Copy what the links lead to, or fetch it by "
    "snapshot_download(local_dir=...)"
)

GRAPH_TYPES = {"fp32": "tensor(float)", "fp16": "tensor(float16)"}
"""ONNX Runtime's names of the dtypes of a coefficient table."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were all checked."""

    folder: Path
    manifest: Manifest

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL_FILE

    @property
    def packed(self) -> Path | None:
        """The second graph, for right-padded batches on CUDA; None where there is none."""
        return self.folder / PACKED_FILE if PACKED_FILE in self.manifest.files else None

    @property
    def alone(self) -> tuple[Path, Path] | None:
        """The graphs for batches of one customer: that makes merged weights, and that takes them; None: it has none."""
        files = self.folder / MERGE_FILE, self.folder / ALONE_FILE
        return files if all(file.name in self.manifest.files for file in files) else None


def digest_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder` but the manifest, by its path with forward slashes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: digest_file(file) for name, file in names.items() if name != MANIFEST_FILE}


def open_bundle(folder: str | os.PathLike[str], graph: bool = True) -> Bundle:
    """Check a bundle completely; nothing in it has been given to ONNX Runtime before.

    Args:
        folder: the bundle.
        graph: False: its graph and weights run elsewhere, and need not be there; the rest is checked all the same.

    Raises:
        FileFormatError: the manifest is damaged or of another version, a file is missing, changed,
            a link or outside the bundle (all of them are named), the manifest says other things
            than the files, or the model keeps weights in a file that the manifest does not seal.
        InputError: it is not a bundle.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    needed = (*NEEDED, BASE_HEAD_FILE) if manifest.head_labels else NEEDED
    missing = [name for name in needed if name not in manifest.files]
    if missing:
        raise FileFormatError(f"{folder}/{MANIFEST_FILE} does not list {', '.join(missing)}")
    problems = [
        f"{_shown(name)} {problem}"
        for name, digest in manifest.files.items()
        if (graph or not is_graph_file(name)) and (problem := _check(folder, name, digest))
    ]
    if problems:
        remedy = f", {LINKS}" if all(problem.endswith(IS_LINK) for problem in problems) else ". Export it again"
        raise FileFormatError(f"{folder} is not the bundle that was exported: {'; '.join(problems)}{remedy}")
    if graph:
        for name in GRAPHS:
            if name in manifest.files:
                _check_external_data(folder / name, manifest)
    wrong = list(manifest_problems(folder, manifest))
    if wrong:
        raise FileFormatError(f"{folder}/{MANIFEST_FILE} does not fit its bundle: {'; '.join(wrong)}. Export it again")
    return Bundle(folder, manifest)


def is_graph_file(name: str) -> bool:
    """Whether a file of a bundle is a graph of it or the weights beside it."""
    return name in (*GRAPHS, WEIGHTS_FILE)


def check_no_decoder(bundle: Bundle) -> None:
    """Make sure that a bundle answers texts as a whole.

    Raises:
        MalformedInputError: it is a decoder's, which writes text.
    """
    if bundle.manifest.deciding_task.writes_text:
        raise MalformedInputError(f"{bundle.folder} is a decoder, which writes text; ask it by `generate`")


def check_graph(session: Any, bundle: Bundle) -> None:
    """Make sure that an open session has the inputs and outputs that the manifest names, and a table of its dtype.

    Raises:
        FileFormatError: it has other ones.
    """
    types = {value.name: value.type for value in session.get_inputs()}
    if TABLE in types and types[TABLE] != GRAPH_TYPES[bundle.manifest.table_dtype]:
        raise FileFormatError(f"{bundle.folder}: the manifest speaks of a table of another dtype than the graph has")
    taken = {record.name: record.shape for record in bundle.manifest.inputs}
    given = {record.name: record.shape for record in bundle.manifest.outputs}
    if BORDERS in types:
        # Such a graph takes no more than it reads, in a form of its own.
        known = {name: packed_axes(name) for name in (*PACKED_INPUTS, *(taken.keys() - CUSTOMER_INPUTS))}
        known |= {name: shape for name, shape in taken.items() if name in CUSTOMER_INPUTS}
        taken = {name: shape for name, shape in known.items() if name in types}
    for expected, values in ((taken, session.get_inputs()), (given, session.get_outputs())):
        if {value.name: tuple(value.shape) for value in values} != expected:
            raise FileFormatError(f"{bundle.folder}: the manifest speaks of other inputs or outputs than the graph has")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not is_file(path):
        raise InputError(f"{folder} is not a bundle: it holds no {MANIFEST_FILE}")
    if path.is_symlink():
        raise FileFormatError(f"{path} {IS_LINK}, {LINKS}")
    text = read_text(path, MAX_MANIFEST_BYTES)
    what = f"{path} is not a manifest"
    record = parse_json(text, f"{path} is not JSON")
    record = VERSIONS.upgraded(path, record if isinstance(record, dict) else {}, what)
    return from_json(Manifest, json.dumps(record), what)


def _check(folder: Path, name: str, digest: str) -> str:
    """What is wrong with one file of the manifest; empty when nothing is."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ":" in name or ".." in parts or "\0" in name:
        return "lies outside the bundle"
    steps = [folder.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    try:
        if any(step.is_symlink() for step in steps):
            return IS_LINK
        if not steps[-1].is_file():
            return "is missing"
        return "" if digest_file(steps[-1]) == digest else "was changed"
    except OSError as error:  # such as a name that is too long for the system
        return f"cannot be read: {error.strerror or 'an error of the system'}"


def _shown(name: str) -> str:
    """What came from the manifest, short and on one line."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _check_external_data(path: Path, manifest: Manifest) -> None:
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise FileFormatError(f"{path} is larger than an ONNX file can be")
    try:
        locations = external_locations(path.read_bytes())
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    # Only names that the manifest seals: that rules out `..`, absolute paths, links and the
    # address of a piece of memory, which ONNX Runtime also takes for a location.
    foreign = sorted(locations - set(manifest.files))
    if foreign:
        raise FileFormatError(f"{path} keeps weights outside the bundle: {', '.join(foreign[:3])}")
