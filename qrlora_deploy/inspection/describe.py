"""What a file or folder of this project is, and what is in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from qrlora_deploy.errors import InputError, library_errors
from qrlora_deploy.formats import basis as basis_format
from qrlora_deploy.formats import coefficients as coefficients_format
from qrlora_deploy.formats.basis import Basis, read_basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients
from qrlora_deploy.formats.config_file import ModelConfig, label_names, read_model_config
from qrlora_deploy.formats.provenance import FILE_NAME as PROVENANCE
from qrlora_deploy.formats.provenance import read_provenance
from qrlora_deploy.io.reading import is_file, parse_json, readable
from qrlora_deploy.io.sealing import METADATA_KEY
from qrlora_deploy.models.locating import locate_basis
from qrlora_deploy.models.output_names import output_names
from qrlora_deploy.models.weight_files import digest_of, read_headers, weight_files
from qrlora_deploy.tasks.causal_lm import CausalLM
from qrlora_deploy.tasks.registry import task_of_config

MANIFEST = "manifest.json"
PACKED = "qrlora-packed"
"""Named here as well: files of the other kinds are read without the runtime's dependencies."""

PEFT = "an adapter of PEFT, which this project writes (`export` in the format peft) and does not read"

GGUF = b"GGUF"
"""How such files begin."""

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
"""Of a model: what tells two at a look."""


@dataclass(frozen=True)
class Description:
    """What `describe` found.

    Attributes:
        kind: "basis", "coefficients", "packed customers", "bundle", "merged checkpoint" or "checkpoint".
        path: as given.
        size_bytes: of the file, or of all files of the folder.
        facts: name and value.
        targets: one record per adapted weight, all with the same keys; empty where not known.
        basis: the basis, of a basis file or of a customer whose basis was found.
        coefficients: the customer, of a coefficients file.
    """

    kind: str
    path: Path
    size_bytes: int
    facts: Mapping[str, Any]
    targets: tuple[Mapping[str, Any], ...] = ()
    basis: Basis | None = field(default=None, repr=False)
    coefficients: Coefficients | None = field(default=None, repr=False)


def describe(path: Path, basis_file: Path | None = None) -> Description:
    """Read and validate `path` whole, and say what it is.

    Args:
        path: a basis, coefficients or packed file, a bundle, a merged checkpoint or a checkpoint.
        basis_file: for a coefficients file, where its own basis is not found.

    Raises:
        InputError: there is nothing, or nothing that is known.
        FileFormatError: it is damaged.
        BasisMismatchError: `basis_file` is another basis.
    """
    with readable(path):
        is_folder = path.is_dir()
    if is_folder:
        return _describe_folder(path)
    if not is_file(path):
        raise InputError(f"{path} is no plain file or folder" if path.exists() else f"{path}: no such file or folder")
    kind = _kind(path)
    if kind == basis_format.FORMAT:
        return _describe_basis(path)
    if kind == coefficients_format.FORMAT:
        return _describe_coefficients(path, basis_file)
    if kind == PACKED:
        return _describe_packed(path)
    raise InputError(f"{path} is {_guess(path)}; give a basis, a coefficients or packed file, a bundle or a checkpoint")


def _kind(path: Path) -> str:
    """What a safetensors file says it is; its reader then makes sure."""
    with readable(path), path.open("rb") as opened:
        if opened.read(len(GGUF)) == GGUF:
            raise InputError(f"{path} is a GGUF file; `convert` makes a checkpoint of it, which is read everywhere")
    damaged = f"{path} is not a complete safetensors file"
    with library_errors(damaged), readable(path), safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    record = parse_json((metadata or {}).get(METADATA_KEY, "{}"), f"{path}: its metadata is not JSON")
    return str(record.get("format", "")) if isinstance(record, dict) else ""


def _guess(path: Path) -> str:
    """What a safetensors file of somebody else looks like, by the names of its tensors."""
    with (
        library_errors(f"{path} is not a complete safetensors file"),
        safetensors.safe_open(path, framework="np") as file,
    ):
        names = list(file.keys())
    if any(name.startswith("base_model.model.") for name in names):
        return PEFT
    if any(name.endswith(".weight") for name in names):
        return "the weights of a model; inspect the folder that holds them and their config.json"
    return "no file of this project"


def _describe_basis(path: Path) -> Description:
    basis = read_basis(path)
    facts = {
        "digest": basis.digest,
        "base_name": basis.base_name,
        "rule": str(basis.rule),
        **({"weighting": str(basis.weighting)} if basis.weighting else {}),
        "targets": len(basis.targets),
        "total_rank": basis.total_rank,
        "coefficient_bytes": 4 * basis.total_rank,
        "versions": basis.versions,
    }
    return Description("basis", path, path.stat().st_size, facts, basis_rows(basis), basis)


def basis_rows(basis: Basis) -> tuple[dict[str, Any], ...]:
    """One record per target: shape, rank, share of the energy kept, condition of the kept part."""
    return tuple(
        {
            "name": target.name,
            "shape": [target.q.shape[0], target.r.shape[1]],
            "rank": target.rank,
            "energy": target.energy,
            "condition": target.condition,
        }
        for target in basis.targets
    )


def _describe_coefficients(path: Path, basis_file: Path | None) -> Description:
    customer = read_coefficients(path)
    basis = _basis_of(customer, path, basis_file)
    values = customer.values.astype(np.float64)
    facts = {
        "digest": customer.digest,
        "task": customer.task,
        "labels": list(customer.labels),
        **({"thresholds": list(customer.thresholds)} if customer.thresholds else {}),
        "coefficients": len(values),
        "norm": float(np.linalg.norm(values)),
        "largest": float(np.abs(values).max()),
        "head": {name: list(array.shape) for name, array in customer.head.items()},
        "base_name": customer.base_name,
        "base_digest": customer.base_digest,
        "basis_file": customer.basis_file,
        "basis_digest": customer.basis_digest,
        "basis_found": basis is not None,
        "training": customer.training,
    }
    rows = () if basis is None else _customer_rows(customer, basis)
    return Description("coefficients", path, path.stat().st_size, facts, rows, basis, customer)


def _basis_of(customer: Coefficients, path: Path, basis_file: Path | None) -> Basis | None:
    """The basis, where there is one: a customer's file can be read without it."""
    try:
        return locate_basis(customer, path, basis_file)
    except InputError:
        if basis_file is not None:
            raise
        return None


def direction_norms(basis: Basis, values: np.ndarray) -> dict[str, np.ndarray]:
    """How far each direction moves its weight: `|c_i| ||R_i||`, `[rank]` in fp64 by target name.

    The columns of `Q` are orthonormal, so these are the Frobenius norms of the rank-one parts of
    the update, and the root of the sum of their squares is that of the whole, `||Q diag(c) R||`.

    Args:
        basis: the factors.
        values: a customer's coefficients, `[total_rank]`.

    Raises:
        InputError: the length does not fit the basis.
    """
    parts = basis.split(values)
    return {
        target.name: np.abs(parts[target.name].astype(np.float64)) * np.linalg.norm(target.r.astype(np.float64), axis=1)
        for target in basis.targets
    }


def _customer_rows(customer: Coefficients, basis: Basis) -> tuple[dict[str, Any], ...]:
    moved = direction_norms(basis, customer.values)
    return tuple(
        {
            "name": name,
            "rank": len(part),
            "norm": float(np.linalg.norm(part.astype(np.float64))),
            "largest": float(np.abs(part).max()),
            "update_norm": float(np.linalg.norm(moved[name])),
        }
        for name, part in basis.split(customer.values).items()
    )


def _describe_packed(path: Path) -> Description:
    from qrlora_deploy.runtime.customers.packed_check import check_packed
    from qrlora_deploy.runtime.customers.packed_header import STORED_DTYPES, facts_of

    header = check_packed(path)
    stored = facts_of(header, path)
    facts = {
        "customers": header.customers,
        "coefficients": header.total_rank,
        "dtype": str(STORED_DTYPES[header.stored]),
        **({"with thresholds": header.tuned} if header.tuned else {}),
        **{name: stored[name] for name in ("task", "labels", "base_digest", "basis_digest")},
    }
    return Description("packed customers", path, path.stat().st_size, facts)


def _describe_folder(path: Path) -> Description:
    size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if (path / MANIFEST).is_file():
        return _describe_bundle(path, size_bytes)
    if (path / PROVENANCE).is_file():
        provenance = read_provenance(path)
        names = ("base_name", "base_digest", "basis_digest", "coefficients_digest", "task", "labels", "head")
        facts = {name: getattr(provenance, name) for name in names}
        facts |= {"rounding": provenance.rounding, "training": provenance.training, "versions": provenance.versions}
        rows = tuple({"name": target.name, "rank": target.rank} for target in provenance.targets)
        return Description("merged checkpoint", path, size_bytes, facts, rows)
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path} is {PEFT}")
    return _describe_checkpoint(path, size_bytes)


def _task_of(config: ModelConfig, labels: list[str]) -> str | None:
    if config.writes_text:
        return CausalLM.name
    if not labels:
        return None
    return task_of_config(config.problem_type, len(labels), config.architecture, config.qrlora_task).name


def _describe_checkpoint(path: Path, size_bytes: int) -> Description:
    file = path / "config.json"
    if not is_file(file):
        raise InputError(f"{path} is not a checkpoint: it holds no config.json")
    config = read_model_config(file)
    shards = weight_files(path)
    stored = read_headers(shards)
    labels = list(output_names(file, dict(enumerate(label_names(config, file))))) if config.has_task_head else []
    facts = {
        "architecture": config.architecture,
        "tensors": len(stored),
        "shards": [shard.name for shard in shards],
        "has_task_head": config.has_task_head,
        "task": _task_of(config, labels),
        "labels": labels,
        "sizes": {name: size for name in SIZES if (size := getattr(config, name)) is not None},
        "digest": digest_of({name: tensor.digest() for name, tensor in stored.items()}),
    }
    return Description("checkpoint", path, size_bytes, facts)


def _describe_bundle(path: Path, size_bytes: int) -> Description:
    # Imported here: files of the other kinds are read without the runtime's dependencies.
    from qrlora_deploy.runtime.bundle.bundle import open_bundle

    manifest = open_bundle(path).manifest.model_dump(mode="json")
    rows = tuple(manifest.pop("targets"))
    manifest["files"] = len(manifest["files"])
    manifest["bundle_kind"] = manifest.pop("kind")
    return Description("bundle", path, size_bytes, manifest, rows)
