"""The basis: frozen factors `Q`, `R` of every target weight, shared by all customers of a base."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.io.files import has_format, read_tensors, stored_record, write_tensors
from qrlora_deploy.io.outputs import prepare_file
from qrlora_deploy.io.sealing import digest_arrays
from qrlora_deploy.io.strict import Record, from_value
from qrlora_deploy.io.versions import Versions
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.rank_rules.registry import read_rule, rule_of, stored_rule
from qrlora_deploy.rank_rules.seen import Seen, read_seen

FORMAT = "qrlora-basis"


class _StoredTarget(BaseModel):
    """What a file says of one target beside its tensors."""

    name: str
    rank: int
    weight_digest: str


class _Rule1(Record):
    """The rule in version 1: `tau` or `rank`, and null for the other."""

    tau: float | None
    rank: int | None


class _Stored1(BaseModel):
    """What of version 1 is otherwise today."""

    rule: _Rule1


def _with_kind_of_rule(record: dict[str, Any]) -> dict[str, Any]:
    """From version 1 to 2: a rule is kept by its kind and parameters."""
    old = from_value(_Stored1, record, "the rank rule").rule
    if old.tau is None and old.rank is None:
        raise FileFormatError("the rank rule has neither tau nor a rank")
    return record | {"rule": stored_rule(rule_of(old.tau, old.rank))}


VERSIONS = Versions(2, {1: _with_kind_of_rule})


class _StoredTargets(BaseModel):
    """What a file of any version says of its targets."""

    targets: list[_StoredTarget]


class _Stored(_StoredTargets):
    """What a file says beside its tensors; other fields are passed over."""

    base_name: str
    basis_digest: str
    rule: dict[str, Any]
    versions: dict[str, str]
    weighting: dict[str, Any] | None = None


@dataclass(frozen=True)
class BasisTarget:
    """The factors of one weight `W [out, in]`.

    Attributes:
        name: module path of the layer.
        q: `[out, rank]` fp32, orthonormal columns.
        r: `[rank, in]` fp32, columns in the order of `W`.
        diagonal: `[min(out, in)]` fp32, the whole diagonal of R, from which the rank came; first those of the kept
            directions, in their order. Of a weighted basis it is the diagonal of what was factorized.
        weight_digest: SHA-256 of the stored bytes of the weight that was factorized.
    """

    name: str
    q: np.ndarray
    r: np.ndarray
    diagonal: np.ndarray
    weight_digest: str

    @property
    def rank(self) -> int:
        """Number of directions kept, the number of coefficients of this target."""
        return int(self.q.shape[1])

    @property
    def energy(self) -> float:
        """Share of the diagonal's squared norm in the kept directions; 1 for a zero weight."""
        energies = np.square(self.diagonal.astype(np.float64))
        total = float(energies.sum())
        return float(energies[: self.rank].sum()) / total if total else 1.0

    @property
    def condition(self) -> float:
        """`|R_11| / |R_rr|`; infinite where the last kept direction is zero."""
        last = float(self.diagonal[self.rank - 1])
        return float(self.diagonal[0]) / last if last else float("inf")


@dataclass(frozen=True)
class Basis:
    """All targets of a base in a fixed order, which is the order of a customer's coefficients.

    Attributes:
        targets: the factors of each weight.
        base_name: folder or hub name of the base, as it was given.
        rule: by which the ranks were chosen.
        versions: of the tools that made it.
        file: where it was read from or saved to, as an absolute path; None before that.
        weighting: the data whose inputs to the layers weighted the columns; None: the weights were factorized as they
            are.
    """

    targets: tuple[BasisTarget, ...]
    base_name: str
    rule: RankRule
    versions: dict[str, str]
    file: Path | None = field(default=None, compare=False, repr=False)
    weighting: Seen | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Basis":
        """Read a basis file, as `read_basis`.

        Examples:
            >>> qr.Basis.load("basis.safetensors").names[0]
            'bert.encoder.layer.0.attention.self.query'
        """
        return read_basis(Path(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a basis file, replacing an older one in one step; folders that are missing are made.

        Args:
            path: the file, such as `basis.safetensors`.

        Raises:
            InputError: the file cannot be written, or is there and is no basis.
            QrloraError: the disk is full.
        """
        place = prepare_file(path, "basis", has_format(FORMAT))
        write_basis(self, place)
        # Where it is is no part of what it is: customers trained from now on remember the place.
        object.__setattr__(self, "file", place.absolute())

    @property
    def names(self) -> list[str]:
        """Module paths in order."""
        return [target.name for target in self.targets]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each target, in order."""
        return {target.name: target.rank for target in self.targets}

    @property
    def total_rank(self) -> int:
        """Length of a customer's coefficient vector."""
        return sum(target.rank for target in self.targets)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over `Q`, `R` and the diagonal of every target, in order."""
        return digest_arrays(_tensors(self.targets))

    def split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Cut a flat vector `[total_rank]` into one `[rank]` per target.

        Raises:
            InputError: the length does not fit; the message names what was expected.
        """
        if values.shape != (self.total_rank,):
            ranks = "+".join(str(rank) for rank in self.ranks.values())
            shown = ranks if len(self.targets) <= 8 else f"{len(self.targets)} targets"
            raise InputError(
                f"coefficients do not fit the basis: expected {self.total_rank} values ({shown}), "
                f"found {'x'.join(map(str, values.shape))}"
            )
        ends = np.cumsum(list(self.ranks.values()))[:-1]
        return dict(zip(self.names, np.split(values, ends), strict=True))


def _tensors(targets: Iterable[BasisTarget]) -> dict[str, np.ndarray]:
    return {
        f"{target.name}.{part}": array
        for target in targets
        for part, array in (("Q", target.q), ("R", target.r), ("diagonal", target.diagonal))
    }


def write_basis(basis: Basis, path: Path) -> None:
    """Write a basis file, replacing `path` in one step; an old file survives any failure."""
    metadata = {
        "format": FORMAT,
        "format_version": VERSIONS.current,
        "base_name": basis.base_name,
        "basis_digest": basis.digest,
        "rule": stored_rule(basis.rule),
        "targets": [
            {"name": target.name, "rank": target.rank, "weight_digest": target.weight_digest}
            for target in basis.targets
        ],
        "versions": basis.versions,
    }
    if basis.weighting is not None:
        metadata["weighting"] = basis.weighting.record
    write_tensors(path, _tensors(basis.targets), metadata)


def read_basis(path: Path) -> Basis:
    """Read and validate a basis file.

    Raises:
        FileFormatError: the file is cut, changed, of another format version, or inconsistent.
        InputError: it cannot be read.
    """
    tensors, metadata = read_tensors(path, FORMAT, VERSIONS, _allows)
    stored = from_value(_Stored, metadata, f"{path}: the basis is incomplete or damaged")
    try:
        targets = tuple(_target(tensors, record) for record in stored.targets)
        seen = None if stored.weighting is None else read_seen(stored.weighting)
        basis = Basis(targets, stored.base_name, read_rule(stored.rule), stored.versions, path.absolute(), seen)
    except InputError as error:
        raise FileFormatError(f"{path}: {error}") from error
    # A target named twice would have three tensors for two sets of coefficients.
    if not targets or len(tensors) != 3 * len(targets) or stored.basis_digest != basis.digest:
        raise FileFormatError(f"{path}: the tensors are not those that the basis names")
    for target in targets:
        if not all(np.isfinite(array).all() for array in (target.q, target.r, target.diagonal)):
            raise FileFormatError(f"{path}: {target.name} holds NaN or Inf")
    return basis


def weight_digests(path: Path) -> dict[str, str]:
    """By target the digest of the weight that it was made of, from the header of a basis file alone.

    Raises:
        InputError: it cannot be read, or is no basis.
    """
    stored = from_value(_StoredTargets, stored_record(path), f"{path}: the basis is incomplete or damaged")
    return {target.name: target.weight_digest for target in stored.targets}


def _allows(metadata: dict[str, Any], name: str, shape: tuple[int, ...]) -> bool:
    return re.fullmatch(r"[\w.\-]+\.(?:Q|R|diagonal)", name) is not None and 0 not in shape


def _target(tensors: dict[str, np.ndarray], record: _StoredTarget) -> BasisTarget:
    name, rank = record.name, record.rank
    missing = [part for part in ("Q", "R", "diagonal") if f"{name}.{part}" not in tensors]
    if missing:
        raise FileFormatError(f"the basis is incomplete, {name} has no {' and no '.join(missing)}")
    q, r, diagonal = (tensors[f"{name}.{part}"] for part in ("Q", "R", "diagonal"))
    if q.ndim != 2 or r.ndim != 2 or q.shape[1] != rank or r.shape[0] != rank:
        raise FileFormatError(f"the factors of {name} have shapes {q.shape} and {r.shape}, not of rank {rank}")
    if diagonal.shape != (min(q.shape[0], r.shape[1]),):
        raise FileFormatError(f"the diagonal of {name} has shape {diagonal.shape}")
    return BasisTarget(name, q, r, diagonal, record.weight_digest)
