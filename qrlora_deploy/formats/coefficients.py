"""A customer: the vector `c` of all targets, and its own output head where it has one."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.io.files import has_format, read_tensors, write_tensors
from qrlora_deploy.io.outputs import prepare_file
from qrlora_deploy.io.sealing import digest_arrays
from qrlora_deploy.io.strict import from_value
from qrlora_deploy.io.tensor_content import read_tensors_content
from qrlora_deploy.io.versions import Versions
from qrlora_deploy.tasks.thresholds import check_thresholds

FORMAT = "qrlora-coefficients"
VALUES = "coefficients"
HEAD = "head."
THRESHOLDS = "thresholds"


def _without_thresholds(record: dict[str, Any]) -> dict[str, Any]:
    """A record of version 1, which knew none, as version 2 has it."""
    return {name: value for name, value in record.items() if name != THRESHOLDS}


VERSIONS = Versions(2, {1: _without_thresholds})
WITHOUT_THRESHOLDS = 1
"""The version that a customer without thresholds is written in, so that every release can read it. An older release
would decide otherwise than one with thresholds was meant, and refuses it by its version."""

SUFFIX = ".safetensors"
MAX_ID_CHARACTERS = 128
CUSTOMER_ID = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{MAX_ID_CHARACTERS - 1}}}")
"""What a customer may be called, whose file has the name with `SUFFIX` behind it."""


class _Stored(BaseModel):
    """What a file says beside its tensors; other fields are passed over."""

    basis_digest: str
    basis_file: str
    base_name: str
    base_digest: str
    task: str
    labels: list[str]
    training: dict[str, Any]
    thresholds: list[float] = Field(default_factory=list)


@dataclass(frozen=True)
class Coefficients:
    """What makes a customer, and what it was trained on.

    Attributes:
        values: `[total_rank]` fp32, in the order of the basis's targets.
        basis_digest: the basis that gives the values a meaning.
        base_name: folder or hub name of the base, as it was given.
        base_digest: SHA-256 over all tensors of the base, so that a base with another head but
            equal targets is told apart.
        task: name of the task, such as "text-classification".
        labels: names of the outputs.
        head: the customer's own output layer, by tensor name of the checkpoint; empty when the
            base's head is used.
        basis_file: where the basis was, so that it need not be given again: an absolute path, or one seen from the
            folder of the customer's file. A file holds the latter.
        training: the training record (data digest, seed, steps, metrics), plain JSON values.
        thresholds: of a multi-label customer, for each label the probability from which on it applies; empty: 0.5.
    """

    values: np.ndarray
    basis_digest: str
    base_name: str
    base_digest: str
    task: str
    labels: tuple[str, ...]
    head: dict[str, np.ndarray] = field(default_factory=dict)
    basis_file: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    thresholds: tuple[float, ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the values, the head and the thresholds: what the customer does, whatever its file says."""
        return content_digest(self.values, self.head, self.thresholds)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Coefficients":
        """Read a coefficients file, as `read_coefficients`.

        Examples:
            >>> qr.Coefficients.load("customers/acme.safetensors").labels
            ('travel', 'banking', 'home', 'kitchen')
        """
        return read_coefficients(Path(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a coefficients file, replacing an older one in one step; folders that are missing are made.

        Args:
            path: the file; a folder of customers names each `<customer>.safetensors`.

        Raises:
            InputError: a value is NaN or Inf, or the file cannot be written, or is there and is no coefficients file.
            QrloraError: the disk is full.
        """
        write_coefficients(self, prepare_file(path, "coefficients file", has_format(FORMAT)))

    def check_fits(self, basis: Basis) -> None:
        """Make sure that the values belong to `basis`.

        Raises:
            BasisMismatchError: they were trained on another basis; both are named.
            InputError: they have another length.
        """
        if self.basis_digest != basis.digest:
            raise BasisMismatchError(
                f"the coefficients were trained on basis {self.basis_digest[:12]}, but this basis is "
                f"{basis.digest[:12]}; give the basis they were trained on, or train again"
            )
        basis.split(self.values)


def content_digest(values: np.ndarray, head: Mapping[str, np.ndarray], thresholds: Sequence[float]) -> str:
    """`Coefficients.digest` of a customer, from `values [total_rank]` fp32, the head and the thresholds that it has."""
    heads = {HEAD + name: head[name] for name in sorted(head)}
    decides = {THRESHOLDS: np.array(thresholds)} if thresholds else {}
    return digest_arrays({VALUES: values} | heads | decides)


def recorded_place(path: Path, output: Path) -> str:
    """`path` as it is written into the file `output`: relative to its folder, so that both can be
    moved together and no layout of a disk is given away."""
    try:
        return Path(os.path.relpath(path.resolve(), output.resolve().parent)).as_posix()
    except ValueError:  # Windows: another drive
        return path.name


def write_coefficients(coefficients: Coefficients, path: Path) -> None:
    """Write a coefficients file, replacing `path` in one step; an old file survives any failure.

    A basis that is remembered by an absolute path is written as seen from the file's folder.

    Raises:
        InputError: a value is NaN or Inf, or the thresholds are not those of the labels.
    """
    _check(path, coefficients)
    basis_file = Path(coefficients.basis_file)
    metadata = {
        "format": FORMAT,
        "format_version": VERSIONS.current if coefficients.thresholds else WITHOUT_THRESHOLDS,
        "basis_digest": coefficients.basis_digest,
        "basis_file": recorded_place(basis_file, path) if basis_file.is_absolute() else coefficients.basis_file,
        "base_name": coefficients.base_name,
        "base_digest": coefficients.base_digest,
        "task": coefficients.task,
        "labels": list(coefficients.labels),
        "training": coefficients.training,
        **({THRESHOLDS: list(coefficients.thresholds)} if coefficients.thresholds else {}),
    }
    head = {HEAD + name: array for name, array in coefficients.head.items()}
    write_tensors(path, {VALUES: coefficients.values} | head, metadata)


def read_coefficients(path: Path) -> Coefficients:
    """Read and validate a coefficients file.

    Raises:
        FileFormatError: the file is cut, changed, of another format version, holds NaN, Inf or an
            unknown tensor.
        InputError: it cannot be read.
    """
    return _coefficients(path, *read_tensors(path, FORMAT, VERSIONS, _allows))


def read_coefficients_content(content: bytes, path: Path | str) -> Coefficients:
    """As `read_coefficients`, from the content of a file; `path` is what messages call it."""
    return _coefficients(path, *read_tensors_content(content, path, FORMAT, VERSIONS, _allows))


def _coefficients(path: Path | str, tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> Coefficients:
    stored = from_value(_Stored, metadata, f"{path} is damaged")
    if VALUES not in tensors:
        raise FileFormatError(f"{path} is damaged: the tensor {VALUES!r} is missing")
    coefficients = Coefficients(
        values=tensors.pop(VALUES),
        basis_digest=stored.basis_digest,
        base_name=stored.base_name,
        base_digest=stored.base_digest,
        task=stored.task,
        labels=tuple(stored.labels),
        head={name.removeprefix(HEAD): array for name, array in tensors.items()},
        basis_file=stored.basis_file,
        training=stored.training,
        thresholds=tuple(stored.thresholds),
    )
    _check(path, coefficients)
    return coefficients


def _allows(metadata: dict[str, Any], name: str, shape: tuple[int, ...]) -> bool:
    if name == VALUES:
        return len(shape) == 1 and shape[0] > 0
    return name.startswith(HEAD) and len(shape) in (1, 2)


def _check(path: Path | str, coefficients: Coefficients) -> None:
    arrays = {VALUES: coefficients.values} | coefficients.head
    wrong = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if wrong:
        raise FileFormatError(f"{path}: {', '.join(wrong)} holds NaN or Inf")
    if coefficients.values.dtype != np.float32:
        raise InputError(f"{path}: coefficients are fp32, not {coefficients.values.dtype}")
    try:
        check_thresholds(coefficients.thresholds, len(coefficients.labels))
    except ValueError as error:
        raise FileFormatError(f"{path}: {error}") from error
