"""The bundle: a folder that holds a model, its tokenizer and a manifest that seals both."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.files import digest_file
from qrlora_deploy.reading import check_version, is_file, parse_json, read_text
from qrlora_deploy.runtime.external_data import external_locations
from qrlora_deploy.runtime.layout import (
    BASE_HEAD_FILE,
    HEAD_TABLE,
    TABLE,
    TABLE_DTYPES,
    HeadLayout,
    TableLayout,
    padded_rank,
)
from qrlora_deploy.runtime.records import (
    CalibrationRecord,
    ParityRecord,
    Precision,
    TargetRecord,
    TensorRecord,
)
from qrlora_deploy.runtime.sealed_facts import read_config_facts, read_head_row, read_reference_facts
from qrlora_deploy.strict import Record, from_json

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
REFERENCE_FILE = "reference.safetensors"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "config.json"
NEEDED = (MODEL_FILE, REFERENCE_FILE, TOKENIZER_FILE, CONFIG_FILE)

MAX_MANIFEST_BYTES = 16 * 2**20
MAX_SHOWN = 120
"""Characters of a name or a reason in a message."""
MAX_GRAPH_BYTES = 2**31 - 1
"""Protobuf's own limit for one message."""

GRAPH_TYPES = {"fp32": "tensor(float)", "fp16": "tensor(float16)"}
"""ONNX Runtime's names of the dtypes of a coefficient table."""

Digest = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Record):
    """What a bundle is and what every one of its files must hash to.

    Attributes:
        kind: "merged": one customer, plain weights; "switchable": any customer in any row.
        precision: of weights and activations; the inputs and outputs are the same in every one.
        calibration: of int8 with constant scales; None: it has none, or an earlier version did not say.
        coefficients_digest: the customer of a merged bundle.
        total_rank: number of coefficients of a customer.
        head_labels: labels that a customer's own output layer may have; 0: all use the base's.
        head_features: inputs of the output layer, where customers may have their own; else 0.
        customer_effect: `max |logits(c) - logits(0)|` on the reference texts. Parity proves
            nothing about the customer where this is below the bound.
        attention_nodes: `Attention` operators in the graph; 0 where the model's own was exported.
        max_length: tokens the model can take.
    """

    format_version: int = FORMAT_VERSION
    kind: Literal["merged", "switchable"]
    task: Literal["text-classification", "text-regression"]
    labels: tuple[str, ...] = Field(min_length=1)
    precision: Precision
    calibration: CalibrationRecord | None = None
    opset: int
    basis_digest: str = Digest
    coefficients_digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    base_name: str
    base_digest: str = Digest
    total_rank: int = Field(gt=0)
    head_labels: int = Field(default=0, ge=0)
    head_features: int = Field(default=0, ge=0)
    targets: tuple[TargetRecord, ...] = Field(min_length=1)
    inputs: tuple[TensorRecord, ...] = Field(min_length=1)
    outputs: tuple[TensorRecord, ...] = Field(min_length=1)
    files: dict[str, str]
    parity: ParityRecord
    customer_effect: float = Field(ge=0)
    attention_nodes: int = Field(ge=0)
    max_length: int = Field(gt=0, lt=2**31)
    pad_token_id: int = Field(ge=0, lt=2**31)
    padding_side: Literal["right", "left"]
    pad_token_type_id: int = Field(ge=0, lt=2**31)
    versions: dict[str, str]

    @model_validator(mode="after")
    def _check_kind(self) -> "Manifest":
        merged = self.kind == "merged"
        if merged != (self.coefficients_digest is not None):
            raise ValueError(f"a {self.kind} bundle has {'a' if merged else 'no'} coefficients_digest")
        if self.calibration is not None and self.precision != "int8":
            raise ValueError(f"calibration belongs to int8; {self.precision} has no scales to find")
        if bool(self.head_labels) != bool(self.head_features) or (merged and self.head_labels):
            raise ValueError("head_labels and head_features belong together, in a switchable bundle")
        if self.head_labels and self.head_labels < len(self.labels):
            raise ValueError(f"head_labels is {self.head_labels}, but the base has {len(self.labels)} labels")
        return self

    @model_validator(mode="after")
    def _check_shapes(self) -> "Manifest":
        """Before any table is made: the numbers that give its size belong together."""
        ranks = [target.rank for target in self.targets]
        if sum(ranks) != self.total_rank:
            raise ValueError(f"total_rank is {self.total_rank}, but the ranks add up to {sum(ranks)}")
        if any(target.padded_rank != padded_rank(target.rank) for target in self.targets):
            raise ValueError("a padded_rank is not that of its rank")
        if len({record.name for record in self.inputs}) < len(self.inputs):
            raise ValueError("two inputs have one name")
        expected = {}
        if self.kind == "switchable":
            expected[TABLE] = ("slots", TableLayout(ranks).width)
        if self.head_labels:
            expected[HEAD_TABLE] = ("slots", HeadLayout(self.head_labels, self.head_features).width)
        if {record.name: record.shape for record in self.inputs if record.name in (TABLE, HEAD_TABLE)} != expected:
            raise ValueError(f"the inputs do not fit the ranks and the head of a {self.kind} bundle")
        dtypes = {record.name: record.dtype for record in self.inputs}
        if dtypes.get(HEAD_TABLE, "float32") != "float32" or dtypes.get(TABLE, "float32") not in map(
            str, TABLE_DTYPES.values()
        ):
            raise ValueError("a table is of another dtype than float32, or float16 for the coefficients")
        answer = ("logits", ("batch", self.head_labels or len(self.labels)))
        if [(record.name, record.shape) for record in self.outputs] != [answer]:
            raise ValueError(f"the output is not {answer[0]} [{', '.join(map(str, answer[1]))}]")
        return self

    @property
    def table_dtype(self) -> str:
        """Of the coefficient table: "fp32" or "fp16"; of a merged bundle, which has none, "fp32"."""
        found = {record.name: record.dtype for record in self.inputs}.get(TABLE, "float32")
        return next(name for name, dtype in TABLE_DTYPES.items() if dtype == found)

    def to_json(self) -> str:
        """Indented JSON with sorted keys: the same manifest always has the same bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were all checked."""

    folder: Path
    manifest: Manifest

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL_FILE


def digest_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder` but the manifest, by its path with forward slashes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: digest_file(file) for name, file in names.items() if name != MANIFEST_FILE}


def open_bundle(folder: Path) -> Bundle:
    """Check a bundle completely; nothing in it has been given to ONNX Runtime before.

    Raises:
        FileFormatError: the manifest is damaged or of another version, a file is missing, changed,
            a link or outside the bundle (all of them are named), the manifest says other things
            than the files, or the model keeps weights in a file that the manifest does not seal.
        InputError: it is not a bundle.
    """
    manifest = _read_manifest(folder)
    needed = (*NEEDED, BASE_HEAD_FILE) if manifest.head_labels else NEEDED
    missing = [name for name in needed if name not in manifest.files]
    if missing:
        raise FileFormatError(f"{folder}/{MANIFEST_FILE} does not list {', '.join(missing)}")
    problems = [
        f"{_shown(name)} {problem}"
        for name, digest in manifest.files.items()
        if (problem := _check(folder, name, digest))
    ]
    if problems:
        raise FileFormatError(f"{folder} is not the bundle that was exported: {'; '.join(problems)}. Export it again")
    _check_external_data(folder, manifest)
    wrong = [*_config_problems(folder, manifest), *_reference_problems(folder, manifest)]
    if wrong:
        raise FileFormatError(f"{folder}/{MANIFEST_FILE} does not fit its bundle: {'; '.join(wrong)}. Export it again")
    return Bundle(folder, manifest)


def check_graph(session: Any, bundle: Bundle) -> None:
    """Make sure that an open session has the inputs and outputs that the manifest names, and a table of its dtype.

    Raises:
        FileFormatError: it has other ones.
    """
    types = {value.name: value.type for value in session.get_inputs()}
    if TABLE in types and types[TABLE] != GRAPH_TYPES[bundle.manifest.table_dtype]:
        raise FileFormatError(f"{bundle.folder}: the manifest speaks of a table of another dtype than the graph has")
    for records, values in (
        (bundle.manifest.inputs, session.get_inputs()),
        (bundle.manifest.outputs, session.get_outputs()),
    ):
        expected = {record.name: record.shape for record in records}
        if {value.name: tuple(value.shape) for value in values} != expected:
            raise FileFormatError(f"{bundle.folder}: the manifest speaks of other inputs or outputs than the graph has")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not is_file(path):
        raise InputError(f"{folder} is not a bundle: it holds no {MANIFEST_FILE}")
    if path.is_symlink():
        raise FileFormatError(
            f"{path} is a link, as in the hub's cache; a bundle holds files alone. Copy what the links lead to, "
            f"or fetch it by snapshot_download(local_dir=...)"
        )
    text = read_text(path, MAX_MANIFEST_BYTES)
    record = parse_json(text, f"{path} is not JSON")
    check_version(path, record.get("format_version") if isinstance(record, dict) else None, FORMAT_VERSION)
    return from_json(Manifest, text, f"{path} is not a manifest")


def _check(folder: Path, name: str, digest: str) -> str:
    """What is wrong with one file of the manifest; empty when nothing is."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ":" in name or ".." in parts or "\0" in name:
        return "lies outside the bundle"
    steps = [folder.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    try:
        if any(step.is_symlink() for step in steps):
            return "is a link"
        if not steps[-1].is_file():
            return "is missing"
        return "" if digest_file(steps[-1]) == digest else "was changed"
    except OSError as error:  # such as a name that is too long for the system
        return f"cannot be read: {error.strerror or 'an error of the system'}"


def _shown(name: str) -> str:
    """What came from the manifest, short and on one line."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _config_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    facts = read_config_facts(folder / CONFIG_FILE)
    if manifest.labels != facts.labels:
        yield f"its labels are not those of {CONFIG_FILE}"
    regression = manifest.task == "text-regression"
    # The customer of a merged bundle may have classes on a base that gives a number; never the other way round.
    if regression != facts.regression and (regression or manifest.kind == "switchable"):
        yield f"its task is not that of {CONFIG_FILE}"


def _reference_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    facts = read_reference_facts(folder / REFERENCE_FILE)
    padding = {"input_ids": manifest.pad_token_id, "token_type_ids": manifest.pad_token_type_id}
    if any(facts.padding.get(name, frozenset()) - {value} for name, value in padding.items()):
        yield f"its padding is not that of {REFERENCE_FILE}"
    if manifest.max_length != facts.max_length:
        yield f"its max_length is not {facts.max_length}, the longest text of {REFERENCE_FILE}"
    if manifest.kind == "merged":
        return
    # A wrong rank would give a customer's numbers to other directions, in a row of the same width.
    # The sizes come first: they keep hostile numbers from taking memory.
    layout = TableLayout([target.rank for target in manifest.targets])
    if layout.total_rank != len(facts.columns) or not np.array_equal(layout.columns, facts.columns):
        yield f"its ranks are not those of {REFERENCE_FILE}"
    head = HeadLayout(manifest.head_labels, manifest.head_features)
    if head.width != len(facts.base_head):
        yield f"its head is not that of {REFERENCE_FILE}"
    elif manifest.head_labels and not np.array_equal(read_head_row(folder / BASE_HEAD_FILE, head), facts.base_head):
        yield f"{BASE_HEAD_FILE} is not the head of {REFERENCE_FILE}"


def _check_external_data(folder: Path, manifest: Manifest) -> None:
    path = folder / MODEL_FILE
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
