"""How a session is run: what every runner does, and the plain one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qrlora_deploy.errors import QrloraError, first_line
from qrlora_deploy.runtime.bundle.bundle import Manifest
from qrlora_deploy.runtime.bundle.row_layout import CUSTOMER_INPUTS, SLOT
from qrlora_deploy.runtime.host.captures import CAPTURES
from qrlora_deploy.runtime.host.devices import PROVIDERS
from qrlora_deploy.runtime.sessions.packed_tokens import is_packed, pack_batch, packed_names
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, kept_tokens

Inputs = Mapping[str, np.ndarray]


class Bindable(Protocol):
    """What lies on the device from run to run, such as the tables."""

    def bind(self, binding: Any) -> None:
        """Give it to an `onnxruntime.IOBinding`, without a copy."""


Tables = Callable[[], Bindable]
"""The tables as they lie now. Asked for when a run begins, after its rows are held: a table that has
grown since then holds the same ones."""


class Runner(Protocol):
    """Runs batches of one session. Safe for many threads."""

    def run(self, inputs: Inputs, slot: np.ndarray | None = None) -> np.ndarray:
        """Logits `[batch, outputs]` or `[batch, length, outputs]` fp32, or embeddings `[batch, width]`.

        Args:
            inputs: the text inputs, int64 `[batch, length]` each.
            slot: int64 `[batch]`, for a switchable graph only.

        Raises:
            QrloraError: an operator failed.
        """


class PlainRunner:
    """Runs every batch as it comes, in the thread that asks.

    Args:
        session: an `onnxruntime.InferenceSession`.
        names: its text inputs.
        tables: of a switchable graph.
    """

    def __init__(self, session: Any, names: Sequence[str], tables: Tables | None = None) -> None:
        self._session, self._names, self._tables = session, names, tables
        self._answer, self._on_gpu = session.get_outputs()[0].name, is_on_gpu(session)

    def run(self, inputs: Inputs, slot: np.ndarray | None = None, options: Any = None) -> np.ndarray:
        """As `Runner.run`; `options` are ONNX Runtime's `RunOptions`."""
        # Held to the end of the run, or a table that grows meanwhile would be given back.
        memory = None if self._tables is None else self._tables()
        # ONNX Runtime copies to the device what is bound, and answers from it: a capture elsewhere ends by either.
        with CAPTURES.of(self._on_gpu):
            binding = self._session.io_binding()
            for name, array in feeds_of(self._session, inputs, self._names).items():
                binding.bind_cpu_input(name, array)
            if slot is not None:
                binding.bind_cpu_input(SLOT, slot)
            if memory is not None:
                memory.bind(binding)
            binding.bind_output(self._answer, "cpu")
            run_bound(self._session, binding, options)
            logits: np.ndarray = binding.copy_outputs_to_cpu()[0]
        return logits


def is_on_gpu(session: Any) -> bool:
    """Whether a session's operators are, by and large, a GPU's."""
    return bool(session.get_providers()[0] != PROVIDERS["cpu"])


def run_bound(session: Any, binding: Any, options: Any = None) -> None:
    """Run what is bound; on a GPU within a turn of `CAPTURES`.

    Raises:
        QrloraError: an operator failed, as the embedding does on a token that it does not know.
    """
    try:
        session.run_with_iobinding(binding, options)
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:
        raise QrloraError(f"the model does not run on these inputs: {first_line(error)}") from error


def text_inputs(manifest: Manifest) -> list[str]:
    """Names of the graph's inputs that come from the text: not customers' numbers, nor what a runner computes."""
    others = (*CUSTOMER_INPUTS, TOKEN_INDEX)
    return [record.name for record in manifest.inputs if record.name not in others]


def feeds_of(session: Any, inputs: Inputs, names: Sequence[str]) -> dict[str, np.ndarray]:
    """What a session takes of a batch as it comes.

    Args:
        inputs: the text inputs `names`, `[batch, length]` each; right-padded where the graph takes packed tokens.
    """
    if is_packed(session):
        return pack_batch(inputs, packed_names(session))
    feeds = {name: np.ascontiguousarray(inputs[name]) for name in names}
    if is_padding_free(session):
        feeds[TOKEN_INDEX] = kept_tokens(inputs["attention_mask"])
    return feeds


def is_padding_free(session: Any) -> bool:
    """Whether the graph of a session takes the tokens to compute on, which follow from the mask."""
    return any(value.name == TOKEN_INDEX for value in session.get_inputs())
