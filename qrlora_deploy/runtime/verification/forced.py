"""Decoders: rows of different lengths are read at once and then made to say given tokens, and their logits compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from qrlora_deploy.errors import CheckFailed, first_line
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE
from qrlora_deploy.runtime.verification.bounds import DECODER_BOUNDS
from qrlora_deploy.runtime.verification.masked import run_masked, takes_mask
from qrlora_deploy.runtime.verification.reference import Case
from qrlora_deploy.runtime.verification.report import ForcedReport, compare_effects

FOLLOWING, COLUMNS, TOP = "following", "columns", "top"
"""Of a case, beside its prompts `input_ids` and `attention_mask [rows, tokens]`: what each row is made to say
`[rows, steps]`, the tokens whose logits are kept `[columns]`, and the likeliest token `[rows, steps + 1]`."""

PAST, PRESENT = "past_key_values", "present"

ONNX_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
BFLOAT16 = 16
"""ONNX's number of a type that NumPy does not have."""


def run_forced(session: Any, inputs: Mapping[str, np.ndarray], what: str) -> np.ndarray:
    """Logits `[rows, steps + 1, vocabulary]` fp32 behind the prompts and behind each step; the cache stays in place.

    Args:
        session: of a decoder.
        inputs: of a case; the rows' prompts are padded on the right, or on either side where the graph has a mask.
        what: names the case in an error.

    Raises:
        CheckFailed: the graph does not run on it.
    """
    lengths = inputs["attention_mask"].sum(axis=1)
    rows, longest = inputs["input_ids"].shape
    following = inputs[FOLLOWING]
    further = {name: inputs[name] for name in (TABLE, SLOT) if name in inputs}
    try:
        if takes_mask(session):
            return run_masked(session, inputs, following)
        steps = ForcedSteps(session, rows, longest + following.shape[1], further)
        found = [steps.run(inputs["input_ids"], lengths, longest, np.arange(rows) * longest + lengths - 1)]
        for step, tokens in enumerate(following.T, start=1):
            found.append(steps.run(tokens[:, None], lengths + step, steps.buffer, np.arange(rows)))
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:
        raise CheckFailed(f"the model does not run on {what}: {first_line(error)}") from error
    return np.stack(found, axis=1)


class ForcedSteps:
    """A batch that goes on step by step, its cache bound as input and output.

    Args:
        session: of a decoder.
        rows: of the batch.
        buffer: tokens that a row may have.
        further: inputs that stay, such as the table and the slots.
    """

    def __init__(self, session: Any, rows: int, buffer: int, further: Mapping[str, np.ndarray]) -> None:
        self.buffer = buffer
        self._session = session
        self._device = "cuda" if session.get_providers()[0] != "CPUExecutionProvider" else "cpu"
        self._binding = session.io_binding()
        for name, array in further.items():
            self._binding.bind_cpu_input(name, array)
        for value in session.get_inputs():
            if value.name.startswith(PAST):
                cache = _zeros([rows, value.shape[1], buffer, value.shape[3]], value.type, self._device)
                self._binding.bind_ortvalue_input(value.name, cache)
                self._binding.bind_ortvalue_output(value.name.replace(PAST, PRESENT, 1), cache)

    def run(self, ids: np.ndarray, valid: np.ndarray, total: int, token: np.ndarray) -> np.ndarray:
        """Logits `[rows, vocabulary]` behind one more piece of all rows.

        Args:
            ids: `[rows, tokens]`.
            valid: tokens of each row with these.
            total: tokens of the first piece, `buffer` for all others.
            token: of each row, the place of its last token in the flat `ids`.
        """
        inputs = {
            "input_ids": ids.astype(np.int64),
            "seqlens_k": (valid - 1).astype(np.int32),
            "total_sequence_length": np.array([total], np.int32),
            "token": token.astype(np.int64),
        }
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        self._binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(self._binding)
        return np.array(self._binding.get_outputs()[-1].numpy())


def _zeros(shape: Sequence[int], kind: str, device: str) -> Any:
    if kind in ONNX_TYPES:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, ONNX_TYPES[kind]), device)
    # On the device as the others are: a cache that is bound elsewhere is none that stays in place.
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), BFLOAT16, device)
    value.update_inplace(np.zeros(shape, np.uint16))
    return value


def check_forced(session: Any, reference: Sequence[Case], precision: str = "fp32") -> ForcedReport:
    """Run every case and compare with its logits, and the effect of the customers with PyTorch's.

    Args:
        session: of a decoder.
        reference: what PyTorch gives in fp32, of `columns` of the vocabulary alone.
        precision: of the graph; decides the bounds.

    Raises:
        CheckFailed: a case cannot be run.
    """
    errors: dict[str, float] = {}
    worst, agreed, answers, rows, effects = "", 0, 0, 0, []
    for case in reference:
        found = run_forced(session, case.inputs, repr(case.name))
        kept = found[..., case.inputs[COLUMNS]]
        error = np.nan_to_num(np.abs(kept - case.logits), nan=np.inf).max(axis=(1, 2))
        if error.max() >= max(errors.values(), default=0.0):
            worst = f"row {int(error.argmax())} of {case.name!r}"
        errors[case.name] = float(error.max())
        agreed += int((found.argmax(axis=-1) == case.inputs[TOP]).sum())
        answers += case.inputs[TOP].size
        rows += len(found)
        effects.append((kept - _base(session, case), case.logits - case.base_logits))
    effect = compare_effects(*(np.concatenate([np.ravel(pair[side]) for pair in effects]) for side in (0, 1)))
    bound = bound_of_forced(reference, precision)
    return ForcedReport(
        max(errors.values()), bound, agreed / answers, len(reference), rows, worst, errors, precision, *effect
    )


def bound_of_forced(reference: Sequence[Case], precision: str) -> float:
    """What an error may be: a share of the standard deviation of all logits; more with an fp16 table.

    Rounding coefficients to fp16 moves logits by some 2^-11 of the customer's effect; four times that is allowed for.
    """
    spread = float(np.concatenate([np.ravel(case.logits) for case in reference]).std())
    rounded = any(case.inputs[TABLE].dtype == np.float16 for case in reference if TABLE in case.inputs)
    effect = max(float(np.abs(case.logits - case.base_logits).max()) for case in reference)
    return DECODER_BOUNDS[precision].relative * spread + (2.0**-9 * effect if rounded else 0.0)


def _base(session: Any, case: Case) -> np.ndarray:
    """The graph's own logits with all coefficients zero; a merged graph has none, so PyTorch's."""
    if TABLE not in case.inputs:
        return case.base_logits
    inputs = case.inputs | {TABLE: np.zeros_like(case.inputs[TABLE])}
    if SLOT not in inputs:
        # One customer for all rows, whose table is that of the base where none is given.
        del inputs[TABLE]
    return run_forced(session, inputs, repr(case.name))[..., case.inputs[COLUMNS]]
