"""Parity: the logits of a session against those that PyTorch gave on the same inputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qrlora_deploy.errors import CheckFailed
from qrlora_deploy.runtime.bundle.bundle import REFERENCE_FILE, Bundle
from qrlora_deploy.runtime.bundle.row_layout import COEFFICIENTS, TABLE
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.packed_tokens import is_packed
from qrlora_deploy.runtime.sessions.token_index import is_right_padded
from qrlora_deploy.runtime.verification.alone import Progress, check_decoder
from qrlora_deploy.runtime.verification.bounds import BOUNDS, Bounds
from qrlora_deploy.runtime.verification.reference import Case, read_reference, without_padding, write_reference
from qrlora_deploy.runtime.verification.report import ParityReport, compare_effects
from qrlora_deploy.runtime.verification.running import OneByOne, open_for_check, run_logits
from qrlora_deploy.tasks.base import Task

__all__ = [
    "BOUNDS",
    "Bounds",
    "Case",
    "ParityReport",
    "bound_of",
    "check_graphs",
    "check_one_customer",
    "check_parity",
    "check_right_padded",
    "customer_effect",
    "open_for_check",
    "read_reference",
    "run_logits",
    "shows_customers",
    "verify",
    "without_padding",
    "write_reference",
]
# Whoever exports or verifies finds all of it here; the parts are in modules of their own.

PLAIN = 10
"""An effect is told from errors where it is larger than so many bounds of fp32."""


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
    measured = _effect_cases(reference, precision)
    for case in reference:
        found = _run(session, case, case.inputs)
        if any(case is one for one in measured):
            effects.append(_effect(found, _base_logits(session, case), case))
        difference = _difference(found, case.logits).reshape(len(found), -1).max(axis=1)
        errors[case.name] = float(difference.max())
        if errors[case.name] > worst[1]:
            worst = (f"row {int(difference.argmax())} of {case.name!r}", errors[case.name])
        agreed += float(task.agreement(found, case.logits).sum())
        rows += len(found)
    if not rows:
        raise CheckFailed("there is nothing to compare: the reference holds no cases")
    bound = bound_of(reference, precision, task.least_size)
    # What is as small as errors may be has no direction to compare.
    shown = shows_customers(reference, task.least_size)
    effect = compare_effects(np.concatenate(effects), _effects_of(measured)) if shown else (None, None)
    return ParityReport(worst[1], bound, agreed / rows, len(reference), rows, worst[0], errors, precision, *effect)


def check_right_padded(session: Any, reference: Sequence[Case], task: Task, whole: ParityReport) -> ParityReport:
    """Check a graph of packed attention on the cases that it is made for.

    Args:
        session: of that graph.
        reference: as for `check_parity`.
        task: as for `check_parity`.
        whole: the report of the bundle's other graph, on all cases.

    Returns:
        The worse one of the two reports.

    Raises:
        CheckFailed: as of `check_parity`.
    """
    fitting = [case for case in reference if is_right_padded(case.inputs["attention_mask"])]
    return worse(whole, check_parity(session, fitting, task, whole.precision))


def check_one_customer(
    merge: Any, alone: Any, reference: Sequence[Case], task: Task, whole: ParityReport
) -> ParityReport:
    """Check the graphs for batches of one customer: each customer's rows of a case by themselves.

    Args:
        merge: session of the graph that makes merged weights.
        alone: of the one that takes them.
        reference: as for `check_parity`.
        task: as for `check_parity`.
        whole: as for `check_right_padded`.

    Returns:
        The worse one of the two reports.

    Raises:
        CheckFailed: as of `check_parity`.
    """
    session = OneByOne(merge, alone)
    if is_packed(alone):
        return check_right_padded(session, reference, task, whole)
    return worse(whole, check_parity(session, reference, task, whole.precision))


def worse(first: ParityReport, second: ParityReport) -> ParityReport:
    """The report that failed, or has the larger error."""
    if second.passed and (not first.passed or first.max_abs_error >= second.max_abs_error):
        return first
    return second


def bound_of(reference: Sequence[Case], precision: str = "fp32", least_size: float = 1.0) -> float:
    """For fp32 `1e-4 * max(1, max |logit|)`, over the labels that a row has; more with an fp16 table.

    The 1 is `least_size`, of `Task`: numbers of an embedding of length 1 are all small, and 0 is put there.

    Rounding a customer's coefficients to fp16 moves each by at most 2^-11 of itself, and the logits by
    about as much of the customer's effect; four times that is allowed for where effects cancel.
    """
    largest = max(float(np.abs(case.logits[np.isfinite(case.logits)]).max(initial=0)) for case in reference)
    rounded = any(_coefficients(case).dtype == np.float16 for case in reference)
    rounding = 2.0**-9 * customer_effect(reference) if rounded else 0.0
    return BOUNDS[precision].relative * max(least_size, largest) + rounding


def _effect_cases(reference: Sequence[Case], precision: str) -> Sequence[Case]:
    """The cases whose effect is measured, which takes a second run of each.

    All of them where the precision has a bound for it. Elsewhere the effect is for the reader alone, and the case that
    shows it best is enough: the logits themselves are compared in every case.
    """
    if BOUNDS[precision].effect_correlation is not None:
        return reference
    return [max(reference, key=lambda case: customer_effect([case]))] if reference else []


def _base_logits(session: Any, case: Case) -> np.ndarray:
    """The graph's own logits with all coefficients zero; a merged graph has none, so PyTorch's.

    The table is set to zero and not the slot: each row keeps its customer's head.
    """
    name = next((name for name in (TABLE, COEFFICIENTS) if name in case.inputs), None)
    if name is None:
        return case.base_logits
    return _run(session, case, case.inputs | {name: np.zeros_like(case.inputs[name])})


def _coefficients(case: Case) -> np.ndarray:
    """Of the customers of a case, as the graph takes them; of a merged graph none."""
    return case.inputs.get(TABLE, case.inputs.get(COEFFICIENTS, np.empty(0, dtype=np.float32)))


def _effect(logits: np.ndarray, base_logits: np.ndarray, case: Case) -> np.ndarray:
    """`logits(c) - logits(0)` in fp64, flat, of the labels that a row has."""
    present = np.isfinite(case.logits)
    return logits[present].astype(np.float64) - base_logits[present]


def _effects_of(reference: Sequence[Case]) -> np.ndarray:
    return np.concatenate([_effect(case.logits, case.base_logits, case) for case in reference])


def _difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """`|found - expected|`; labels that a customer does not have, and padding, are -inf on both sides."""
    with np.errstate(invalid="ignore"):
        difference = np.where(found == expected, 0.0, np.abs(found - expected))
    # NaN compares false with everything, so it would pass unseen.
    return np.where(np.isfinite(difference), difference, np.inf)


def _run(session: Any, case: Case, inputs: dict[str, np.ndarray]) -> np.ndarray:
    found = run_logits(session, inputs, repr(case.name))
    if found.shape != case.logits.shape:
        raise CheckFailed(f"{case.name!r} gives logits of shape {found.shape}, PyTorch {case.logits.shape}")
    return without_padding(found, case.inputs)


def customer_effect(reference: Sequence[Case]) -> float:
    """`max |logits(c) - logits(0)|`: how far the customer moves the base on these texts."""
    return max(float(_difference(case.logits, case.base_logits).max()) for case in reference)


def shows_customers(reference: Sequence[Case], least_size: float = 1.0) -> bool:
    """Whether the lack of a customer would be noticed: some move the logits clearly on these texts.

    Coefficients of a base that was never trained need not, as its output layer says next to nothing.
    """
    return customer_effect(reference) > PLAIN * bound_of(reference, least_size=least_size)


def verify(
    bundle: Bundle, provider: str = "cpu", threads: int | None = None, progress: Progress | None = None
) -> ParityReport:
    """Repeat the check of the export with the logits that the bundle carries; `progress` is told of a decoder's.

    Raises:
        ProviderError: the provider does not load or cannot compute in the bundle's precision.
        FileFormatError: the reference is damaged.
    """
    precision = bundle.manifest.precision
    reference = read_reference(bundle.folder / REFERENCE_FILE)
    task = bundle.manifest.deciding_task
    if task.writes_text:
        session = open_for_check(bundle.model, precision, provider, threads)
        return check_decoder(session, reference, precision, bundle.model, bundle.manifest.max_length, progress)
    return check_graphs(bundle, reference, task, provider, threads)


def check_graphs(
    bundle: Bundle, reference: Sequence[Case], task: Task, provider: str = "cpu", threads: int | None = None
) -> ParityReport:
    """As `check_parity`, for all graphs that a bundle has for a provider; the report is the worst one's.

    Raises:
        CheckFailed: as of `check_parity`.
        ProviderError: the provider does not load or cannot compute in the bundle's precision.
    """
    precision = bundle.manifest.precision
    report = check_parity(open_for_check(bundle.model, precision, provider, threads), reference, task, precision)
    on_cuda = Device.of(provider).provider == "cuda"
    if bundle.packed is not None and on_cuda:
        packed = open_for_check(bundle.packed, precision, provider, threads)
        report = check_right_padded(packed, reference, task, report)
    if bundle.alone is not None and (on_cuda or bundle.packed is None):
        merge, alone = (open_for_check(path, precision, provider, threads) for path in bundle.alone)
        report = check_one_customer(merge, alone, reference, task, report)
    return report
