"""Opening a graph that is to be checked, and its logits for one batch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qrlora_deploy.errors import CheckFailed, FileFormatError, ProviderError, argument, first_line
from qrlora_deploy.runtime.bundle.row_layout import CUSTOMER_INPUTS, HEAD_TABLE, MERGED, SLOT, TABLE
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.running import feeds_of
from qrlora_deploy.runtime.sessions.session import open_session


def open_for_check(model: Path, precision: str, provider: str | Device = "cpu", threads: int | None = None) -> Any:
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
            f"{Device.of(provider).provider} cannot run a graph in {precision}: {kernel}; {_where_it_runs(precision)}"
        ) from error


def _where_it_runs(precision: str) -> str:
    """What to do where a kernel is missing; 1.23 has none for the scales of a calibrated graph."""
    if precision == "int8":
        return f"install ONNX Runtime 1.24 or newer, or export without {argument('calibration')}"
    return f"export and verify it with {argument('provider', 'cuda')}"


class OneByOne:
    """Answers a batch of several customers by the graphs for one, customer after customer.

    Args:
        merge: session that makes the merged weights of one.
        alone: session that takes them.
    """

    def __init__(self, merge: Any, alone: Any) -> None:
        self._merge, self._alone = merge, alone

    def answer(self, inputs: dict[str, np.ndarray], what: str) -> np.ndarray:
        """As `run_logits`."""
        slots = inputs[SLOT]
        texts = {name: array for name, array in inputs.items() if name not in CUSTOMER_INPUTS}
        heads = {name: inputs[name] for name in (HEAD_TABLE,) if name in inputs}
        names = [value.name for value in self._merge.get_outputs()]
        found: dict[int, np.ndarray] = {}
        for slot in np.unique(slots).tolist():
            weights = self._merge.run(None, {TABLE: inputs[TABLE], SLOT: np.array([slot])}, _quiet())
            rows = np.flatnonzero(slots == slot)
            own = {name: array[rows] for name, array in texts.items()} | ({SLOT: slots[rows]} if heads else {})
            logits = run_logits(self._alone, own | heads | dict(zip(names, weights, strict=True)), what)
            found |= dict(zip(rows.tolist(), logits, strict=True))
        return np.stack([found[row] for row in range(len(slots))])


def run_logits(session: Any, inputs: dict[str, np.ndarray], what: str) -> np.ndarray:
    """Logits of a session for one batch; `what` names the batch in an error.

    Raises:
        CheckFailed: the model does not run on it.
    """
    if isinstance(session, OneByOne):
        return session.answer(inputs, what)
    texts = [name for name in inputs if not _is_number(name)]
    numbers = {name: array for name, array in inputs.items() if _is_number(name)}
    feeds = numbers | feeds_of(session, inputs, texts)
    try:
        return np.asarray(session.run(None, feeds, _quiet())[0])
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:
        raise CheckFailed(f"the model does not run on {what}: {first_line(error)}") from error


def _is_number(name: str) -> bool:
    """Whether an input holds numbers of customers, and none of a text."""
    return name in CUSTOMER_INPUTS or name.startswith(MERGED)


def _quiet() -> Any:
    """Options of a run that logs nothing: what goes wrong in it is raised, and told in one line."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options
