"""The bundle: a folder that holds a model, its tokenizer and a manifest that seals both."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.files import digest_file
from qrlora_deploy.runtime.external_data import external_locations

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
REFERENCE_FILE = "reference.safetensors"
TOKENIZER_FILE = "tokenizer.json"
NEEDED = (MODEL_FILE, REFERENCE_FILE, TOKENIZER_FILE)

MAX_MANIFEST_BYTES = 16 * 2**20
MAX_GRAPH_BYTES = 2**31 - 1
"""Protobuf's own limit for one message."""

Digest = Field(pattern=r"^[0-9a-f]{64}$")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetRecord(_Strict):
    """One adapted layer; `padded_rank` is the rank in the table of a switchable bundle."""

    name: str
    rank: int = Field(gt=0)
    padded_rank: int = Field(gt=0)


class TensorRecord(_Strict):
    """One input or output of the graph; a dynamic axis has a name instead of a size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


Precision = Literal["fp32", "fp16", "bf16"]


class ParityRecord(_Strict):
    """The parity check that the export ended with.

    Attributes:
        effect_correlation: cosine of the customers' effect, `logits(c) - logits(0)`, in the graph
            and in PyTorch, over all logits; None in bundles of earlier versions, and where there is
            no effect to compare with.
        effect_error: largest difference of the two effects, relative to the largest effect.
        accuracy: share of right labels of the graph; accuracy_reference: of PyTorch in fp32;
            accuracy_rows: on so many labelled rows. None where the export was given no labels of
            the model's. In a switchable bundle they are the base's.
    """

    max_abs_error: float = Field(ge=0)
    bound: float = Field(gt=0)
    label_agreement: float = Field(ge=0, le=1)
    cases: int = Field(gt=0)
    worst: str
    provider: str
    effect_correlation: float | None = Field(default=None, ge=-1, le=1)
    effect_error: float | None = Field(default=None, ge=0)
    accuracy: float | None = Field(default=None, ge=0, le=1)
    accuracy_reference: float | None = Field(default=None, ge=0, le=1)
    accuracy_rows: int | None = Field(default=None, gt=0)


class Manifest(_Strict):
    """What a bundle is and what every one of its files must hash to.

    Attributes:
        kind: "merged": one customer, plain weights; "switchable": any customer in any row.
        precision: of weights and activations; the inputs and outputs are the same in every one.
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
    max_length: int = Field(gt=0)
    pad_token_id: int = Field(ge=0)
    padding_side: Literal["right", "left"]
    pad_token_type_id: int = Field(ge=0)
    versions: dict[str, str]

    @model_validator(mode="after")
    def _check_kind(self) -> "Manifest":
        merged = self.kind == "merged"
        if merged != (self.coefficients_digest is not None):
            raise ValueError(f"a {self.kind} bundle has {'a' if merged else 'no'} coefficients_digest")
        if bool(self.head_labels) != bool(self.head_features) or (merged and self.head_labels):
            raise ValueError("head_labels and head_features belong together, in a switchable bundle")
        if self.head_labels and self.head_labels < len(self.labels):
            raise ValueError(f"head_labels is {self.head_labels}, but the base has {len(self.labels)} labels")
        return self

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
            a link or outside the bundle (all of them are named), or the model keeps weights in a
            file that the manifest does not seal.
        InputError: it is not a bundle.
    """
    manifest = _read_manifest(folder)
    missing = [name for name in NEEDED if name not in manifest.files]
    if missing:
        raise FileFormatError(f"{folder}/{MANIFEST_FILE} does not list {', '.join(missing)}")
    problems = [
        f"{name} {problem}" for name, digest in manifest.files.items() if (problem := _check(folder, name, digest))
    ]
    if problems:
        raise FileFormatError(f"{folder} is not the bundle that was exported: {'; '.join(problems)}. Export it again")
    _check_external_data(folder, manifest)
    return Bundle(folder, manifest)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(f"{folder} is not a bundle: it holds no {MANIFEST_FILE}")
    if path.is_symlink() or path.stat().st_size > MAX_MANIFEST_BYTES:
        raise FileFormatError(f"{path} is a link or too large for a manifest")
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not JSON: {error}") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise FileFormatError(f"{path} has format version {version!r}; this version reads {FORMAT_VERSION}")
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise FileFormatError(f"{path} is not a manifest: {'; '.join(wrong[:5])}") from error


def _check(folder: Path, name: str, digest: str) -> str:
    """What is wrong with one file of the manifest; empty when nothing is."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ":" in name or ".." in parts or "\0" in name:
        return "lies outside the bundle"
    steps = [folder.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    if any(step.is_symlink() for step in steps):
        return "is a link"
    if not steps[-1].is_file():
        return "is missing"
    return "" if digest_file(steps[-1]) == digest else "was changed"


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
