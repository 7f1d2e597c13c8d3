"""Parity: the logits of a session against those that PyTorch gave on the same inputs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from qrlora_deploy.errors import CheckFailed, FileFormatError
from qrlora_deploy.runtime.bundle import REFERENCE_FILE, Bundle
from qrlora_deploy.runtime.session import open_session

RELATIVE_BOUND = 1e-4
"""fp32: sums of a few hundred products in another order differ by some 1e-6, six layers of them
by some 1e-5; a wrong mask or a lost customer by 1e-2 and more."""

LOGITS, BASE_LOGITS = "logits", "base_logits"
INDEX = "cases"


@dataclass(frozen=True)
class Case:
    """One batch.

    Attributes:
        name: what the batch is about, such as "left padding".
        inputs: int64 `[batch, length]` by input name.
        logits: `[batch, outputs]` fp32 of the customer in PyTorch, by the side branch.
        base_logits: the same with all coefficients zero.
    """

    name: str
    inputs: dict[str, np.ndarray]
    logits: np.ndarray
    base_logits: np.ndarray


@dataclass(frozen=True)
class ParityReport:
    """The outcome of a parity check.

    Attributes:
        max_abs_error: largest difference of two logits.
        bound: what it may be, `1e-4 * max(1, max |logit|)`.
        label_agreement: share of rows whose largest logit is the same one.
        cases: number of batches; rows: number of rows in them.
        worst: the row with the largest difference.
    """

    max_abs_error: float
    bound: float
    label_agreement: float
    cases: int
    rows: int
    worst: str
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.max_abs_error <= self.bound

    def raise_if_failed(self) -> None:
        """Raise unless the check passed.

        Raises:
            CheckFailed: naming the error, the bound and the worst row.
        """
        if not self.passed:
            raise CheckFailed(
                f"logits differ from PyTorch: max abs error {self.max_abs_error:.1e} > {self.bound:.1e} "
                f"(fp32, {self.rows} inputs, worst: {self.worst})"
            )


def check_parity(session: Any, reference: Sequence[Case]) -> ParityReport:
    """Run every case and compare with its logits.

    Raises:
        CheckFailed: a case cannot be run or gives another shape.
    """
    errors, worst, agreed, rows = {}, ("", -1.0), 0, 0
    for case in reference:
        found = _run(session, case)
        difference = _difference(found, case.logits).max(axis=1)
        errors[case.name] = float(difference.max())
        if errors[case.name] > worst[1]:
            worst = (f"row {int(difference.argmax())} of {case.name!r}", errors[case.name])
        agreed += int((found.argmax(axis=1) == case.logits.argmax(axis=1)).sum())
        rows += len(found)
    if not rows:
        raise CheckFailed("there is nothing to compare: the reference holds no cases")
    return ParityReport(worst[1], bound_of(reference), agreed / rows, len(reference), rows, worst[0], errors)


def bound_of(reference: Sequence[Case]) -> float:
    """`1e-4 * max(1, max |logit|)`, over the labels that a row has."""
    largest = max(float(np.abs(case.logits[np.isfinite(case.logits)]).max(initial=0)) for case in reference)
    return RELATIVE_BOUND * max(1.0, largest)


def _difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """`|found - expected|`; labels that a customer does not have are -inf on both sides."""
    with np.errstate(invalid="ignore"):
        difference = np.where(found == expected, 0.0, np.abs(found - expected))
    # NaN compares false with everything, so it would pass unseen.
    return np.where(np.isfinite(difference), difference, np.inf)


def _run(session: Any, case: Case) -> np.ndarray:
    try:
        found = np.asarray(session.run([LOGITS], case.inputs)[0])
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckFailed(f"the model does not run on {case.name!r}: {reason}") from error
    if found.shape != case.logits.shape:
        raise CheckFailed(f"{case.name!r} gives logits of shape {found.shape}, PyTorch {case.logits.shape}")
    return found


def customer_effect(reference: Sequence[Case]) -> float:
    """`max |logits(c) - logits(0)|`: how far the customer moves the base on these texts."""
    return max(float(_difference(case.logits, case.base_logits).max()) for case in reference)


def verify(bundle: Bundle, provider: str = "cpu", threads: int | None = None) -> ParityReport:
    """Repeat the check of the export with the logits that the bundle carries.

    Raises:
        ProviderError: the provider does not load. FileFormatError: the reference is damaged.
    """
    return check_parity(open_session(bundle.model, provider, threads), read_reference(bundle.folder / REFERENCE_FILE))


def write_reference(reference: Sequence[Case], path: Path) -> None:
    """Write the cases into a folder that is not yet in use; the manifest seals the file."""
    tensors = {}
    for index, case in enumerate(reference):
        arrays = case.inputs | {LOGITS: case.logits, BASE_LOGITS: case.base_logits}
        tensors.update({f"{index}.{name}": np.ascontiguousarray(array) for name, array in arrays.items()})
    names = json.dumps([case.name for case in reference])
    path.write_bytes(safetensors.numpy.save(tensors, {INDEX: names}))


def read_reference(path: Path) -> list[Case]:
    """Read the cases of a bundle.

    Raises:
        FileFormatError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = json.loads((file.metadata() or {})[INDEX])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return [_case(tensors, index, name) for index, name in enumerate(names)]
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path} holds no reference logits: {error}") from error


def _case(tensors: dict[str, np.ndarray], index: int, name: str) -> Case:
    prefix = f"{index}."
    arrays = {key.removeprefix(prefix): array for key, array in tensors.items() if key.startswith(prefix)}
    return Case(str(name), logits=arrays.pop(LOGITS), base_logits=arrays.pop(BASE_LOGITS), inputs=arrays)
