"""Parity: the logits of a session against those that PyTorch gave on the same inputs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import safetensors
import safetensors.numpy

from qrlora_deploy.errors import CheckFailed, FileFormatError, ProviderError, first_line, library_errors
from qrlora_deploy.io.reading import parse_json, readable
from qrlora_deploy.runtime.bundle.bundle import REFERENCE_FILE, Bundle
from qrlora_deploy.runtime.bundle.row_layout import TABLE
from qrlora_deploy.runtime.bundle.sealed_facts import SEALED
from qrlora_deploy.runtime.sessions.running import is_padding_free
from qrlora_deploy.runtime.sessions.session import open_session
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, kept_tokens
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.registry import task_named


@dataclass(frozen=True)
class Bounds:
    """What a precision may cost.

    Attributes:
        relative: largest error of a logit, by `max(1, max |logit|)`.
        effect_correlation: least cosine of the customers' effect with PyTorch's; None: not judged.
        label_agreement: least share of rows with PyTorch's label; None: not judged.
    """

    relative: float
    effect_correlation: float | None = None
    label_agreement: float | None = None


BOUNDS = {
    "fp32": Bounds(1e-4),
    "fp16": Bounds(1e-2, 0.99),
    "bf16": Bounds(8e-2, 0.95),
    "int8": Bounds(0.25, 0.95, 0.75),
}
"""fp32: sums of a few hundred products in another order differ by some 1e-6, six layers of them
by some 1e-5; a wrong mask or a lost customer by 1e-2 and more.

fp16 and bf16: each rounding is off by at most 2^-11 = 5e-4 and 2^-8 = 4e-3. Roundings of a layer
add up like a random walk, and the residual stream carries them on: encoders of 2 to 12 layers
come out 1 to 4 roundings off. The bounds are 20 of them. A customer that is lost entirely can stay
below such an error, so the effect is judged by itself: its noise is the same few roundings,
which are a small part of any effect that decides a label.

int8: a rounding of an activation is off by up to 1/510 of the range of its whole tensor, which a few
outliers make large. Six layers come out 0.04 to 0.12 off, and 0.18 in a row whose mask has holes; the
bound is above that and catches a wrong scale. What matters more is judged by itself. On a trained base
customers that are trained, or made up to be as strong, keep a correlation of 0.97 to 0.99, and of 0.96
at least with calibrated scales. At 0.95 a third of an effect is noise, and a base whose output layer
was never trained is below: 0.86 to 0.92. A lost customer has about 0. Labels agree in 86 to 100 % of
the rows while accuracy changes by a percent: of 35 rows and 150 labels five are near ties. A quarter of
other labels is more than that by two standard errors."""

PLAIN = 10
"""An effect is told from errors where it is larger than so many bounds of fp32."""

LOGITS, BASE_LOGITS = "logits", "base_logits"
WHERE_IT_RUNS = {
    "fp16": "export and verify it with --provider cuda",
    "bf16": "export and verify it with --provider cuda",
    "int8": "install ONNX Runtime 1.24 or newer, or export without --calibration",
}
"""What to do where a kernel is missing; 1.23 has none for the scales of a calibrated graph."""

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
        bound: what it may be, for fp32 `1e-4 * max(1, max |logit|)`.
        label_agreement: mean over the rows of `Task.agreement`: the share of rows with the same label.
        cases: number of batches.
        rows: number of rows in them.
        worst: the row with the largest difference.
        errors: largest difference in each case, by its name.
        precision: of the graph.
        effect_correlation: cosine of `logits(c) - logits(0)` in the graph and in PyTorch, over all
            logits of all rows; not centred, since a shift of every logit is an effect too. None
            where PyTorch knows of no effect.
        effect_error: largest difference of the two, relative to the largest effect.
    """

    max_abs_error: float
    bound: float
    label_agreement: float
    cases: int
    rows: int
    worst: str
    errors: dict[str, float] = field(default_factory=dict)
    precision: str = "fp32"
    effect_correlation: float | None = None
    effect_error: float | None = None

    @property
    def passed(self) -> bool:
        """Whether everything is within its bound; NaN is not."""
        return not self._failures()

    def raise_if_failed(self) -> None:
        """Raise unless the check passed.

        Raises:
            CheckFailed: naming the numbers that are out of bounds, the bounds and the worst row.
        """
        failures = self._failures()
        if failures:
            raise CheckFailed(
                f"{'; '.join(failures)} ({self.precision}, {self.rows} inputs, worst: {self.worst})"
                + ("" if self.precision == "fp32" else "; choose another --precision")
            )

    def _failures(self) -> list[str]:
        failures = []
        if not self.max_abs_error <= self.bound:
            failures.append(f"logits differ from PyTorch: max abs error {self.max_abs_error:.1e} > {self.bound:.1e}")
        least, found = BOUNDS[self.precision].effect_correlation, self.effect_correlation
        if least is not None and found is not None and not found >= least:
            failures.append(f"the customers' effect is not PyTorch's: correlation {found:.4f} < {least}")
        least, found = BOUNDS[self.precision].label_agreement, self.label_agreement
        if least is not None and not found >= least:
            failures.append(f"labels are not PyTorch's: agreement {found:.4f} < {least}")
        return failures


def check_parity(session: Any, reference: Sequence[Case], task: Task, precision: str = "fp32") -> ParityReport:
    """Run every case and compare with its logits, and the effect of the customers with PyTorch's.

    Args:
        session: of the graph.
        reference: what PyTorch gives in fp32.
        task: of the graph; says which answers are equal.
        precision: of the graph; decides the bounds.

    Raises:
        CheckFailed: a case cannot be run or gives another shape.
    """
    errors, worst, agreed, rows = {}, ("", -1.0), 0.0, 0
    effects = []
    for case in reference:
        found = _run(session, case, case.inputs)
        effects.append(_effect(found, _base_logits(session, case), case))
        difference = _difference(found, case.logits).max(axis=1)
        errors[case.name] = float(difference.max())
        if errors[case.name] > worst[1]:
            worst = (f"row {int(difference.argmax())} of {case.name!r}", errors[case.name])
        agreed += float(task.agreement(found, case.logits).sum())
        rows += len(found)
    if not rows:
        raise CheckFailed("there is nothing to compare: the reference holds no cases")
    bound = bound_of(reference, precision)
    # What is as small as errors may be has no direction to compare.
    effect = _compare_effects(np.concatenate(effects), reference) if shows_customers(reference) else (None, None)
    return ParityReport(worst[1], bound, agreed / rows, len(reference), rows, worst[0], errors, precision, *effect)


def bound_of(reference: Sequence[Case], precision: str = "fp32") -> float:
    """For fp32 `1e-4 * max(1, max |logit|)`, over the labels that a row has; more with an fp16 table.

    Rounding a customer's coefficients to fp16 moves each by at most 2^-11 of itself, and the logits by
    about as much of the customer's effect; four times that is allowed for where effects cancel.
    """
    largest = max(float(np.abs(case.logits[np.isfinite(case.logits)]).max(initial=0)) for case in reference)
    rounded = any(case.inputs[TABLE].dtype == np.float16 for case in reference if TABLE in case.inputs)
    rounding = 2.0**-9 * customer_effect(reference) if rounded else 0.0
    return BOUNDS[precision].relative * max(1.0, largest) + rounding


def _base_logits(session: Any, case: Case) -> np.ndarray:
    """The graph's own logits with all coefficients zero; a merged graph has none, so PyTorch's.

    The table is set to zero and not the slot: each row keeps its customer's head.
    """
    if TABLE not in case.inputs:
        return case.base_logits
    return _run(session, case, case.inputs | {TABLE: np.zeros_like(case.inputs[TABLE])})


def _effect(logits: np.ndarray, base_logits: np.ndarray, case: Case) -> np.ndarray:
    """`logits(c) - logits(0)` in fp64, flat, of the labels that a row has."""
    present = np.isfinite(case.logits)
    return logits[present].astype(np.float64) - base_logits[present]


def _compare_effects(found: np.ndarray, reference: Sequence[Case]) -> tuple[float | None, float | None]:
    """Cosine of two effects, and their largest difference by the largest effect."""
    expected = np.concatenate([_effect(case.logits, case.base_logits, case) for case in reference])
    largest = np.abs(expected).max(initial=0)
    if not largest > 0:
        return None, None
    if not np.isfinite(found).all():
        return 0.0, float("inf")
    product = np.linalg.norm(found) * np.linalg.norm(expected)
    # A graph without any effect has no direction either.
    cosine = float(np.clip(found @ expected / product, -1, 1)) if product > 0 else 0.0
    return cosine, float(np.abs(found - expected).max() / largest)


def _difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """`|found - expected|`; labels that a customer does not have are -inf on both sides."""
    with np.errstate(invalid="ignore"):
        difference = np.where(found == expected, 0.0, np.abs(found - expected))
    # NaN compares false with everything, so it would pass unseen.
    return np.where(np.isfinite(difference), difference, np.inf)


def run_logits(session: Any, inputs: dict[str, np.ndarray], what: str) -> np.ndarray:
    """Logits `[batch, outputs]` of a session for one batch; `what` names the batch in an error.

    Raises:
        CheckFailed: the model does not run on it.
    """
    if is_padding_free(session):
        inputs = inputs | {TOKEN_INDEX: kept_tokens(inputs["attention_mask"])}
    try:
        return np.asarray(session.run([LOGITS], inputs, _quiet())[0])
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:
        raise CheckFailed(f"the model does not run on {what}: {first_line(error)}") from error


def _quiet() -> Any:
    """Options of a run that logs nothing: what goes wrong in it is raised, and told in one line."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


def _run(session: Any, case: Case, inputs: dict[str, np.ndarray]) -> np.ndarray:
    found = run_logits(session, inputs, repr(case.name))
    if found.shape != case.logits.shape:
        raise CheckFailed(f"{case.name!r} gives logits of shape {found.shape}, PyTorch {case.logits.shape}")
    return found


def customer_effect(reference: Sequence[Case]) -> float:
    """`max |logits(c) - logits(0)|`: how far the customer moves the base on these texts."""
    return max(float(_difference(case.logits, case.base_logits).max()) for case in reference)


def shows_customers(reference: Sequence[Case]) -> bool:
    """Whether the lack of a customer would be noticed: some move the logits clearly on these texts.

    Coefficients of a base that was never trained need not, as its output layer says next to nothing.
    """
    return customer_effect(reference) > PLAIN * bound_of(reference)


def verify(bundle: Bundle, provider: str = "cpu", threads: int | None = None) -> ParityReport:
    """Repeat the check of the export with the logits that the bundle carries.

    Raises:
        ProviderError: the provider does not load or cannot compute in the bundle's precision.
        FileFormatError: the reference is damaged.
    """
    precision = bundle.manifest.precision
    session = open_for_check(bundle.model, precision, provider, threads)
    reference = read_reference(bundle.folder / REFERENCE_FILE)
    return check_parity(session, reference, task_named(bundle.manifest.task), precision)


def open_for_check(model: Path, precision: str, provider: str = "cpu", threads: int | None = None) -> Any:
    """As `open_session`, and says what to do where a provider cannot compute in `precision`.

    Raises:
        FileFormatError: ONNX Runtime refuses the model.
        InputError: so many threads cannot be started.
        ProviderError: the provider is unknown or did not load, or has no kernel for an operator in `precision`.
    """
    try:
        return open_session(model, provider, threads)
    except FileFormatError as error:
        reason = str(error)
        if precision == "fp32" or "NOT_IMPLEMENTED" not in reason:
            raise
        kernel = reason.rpartition("NOT_IMPLEMENTED : ")[2]
        raise ProviderError(
            f"{provider} cannot run a graph in {precision}: {kernel}; {WHERE_IT_RUNS[precision]}"
        ) from error


def write_reference(reference: Sequence[Case], path: Path, sealed: dict[str, Any]) -> None:
    """Write the cases, and what the manifest will say, into a folder that is not yet in use; it seals the file."""
    tensors = {SEALED: np.frombuffer(json.dumps(sealed, sort_keys=True).encode(), dtype=np.uint8)}
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
    damaged = f"{path} holds no reference logits"
    with library_errors(damaged), readable(path), safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    names = parse_json((metadata or {}).get(INDEX, ""), damaged)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise FileFormatError(f"{damaged}: its cases have no names")
    return [_case(tensors, index, name, damaged) for index, name in enumerate(names)]


def _case(tensors: dict[str, np.ndarray], index: int, name: str, damaged: str) -> Case:
    prefix = f"{index}."
    arrays = {key.removeprefix(prefix): array for key, array in tensors.items() if key.startswith(prefix)}
    missing = [key for key in (LOGITS, BASE_LOGITS) if key not in arrays]
    if missing:
        raise FileFormatError(f"{damaged}: the case {name} has no {' and no '.join(missing)}")
    return Case(name, logits=arrays.pop(LOGITS), base_logits=arrays.pop(BASE_LOGITS), inputs=arrays)
