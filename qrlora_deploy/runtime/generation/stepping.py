"""What one run of a decoder takes and gives, where the host has it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qrlora_deploy.runtime.bundle.row_layout import SLOT
from qrlora_deploy.runtime.generation.sampling import Choice
from qrlora_deploy.runtime.generation.wishes import Wish

INPUTS = ("input_ids", "seqlens_k", "total_sequence_length", "token")
LOGITS = "logits"
GREEDY = "greedy"
"""An output that not every graph has: `[rows]` int64, the likeliest token of each row, of equal ones the first."""


class Answers(Protocol):
    """What the rows of a run gave. Good until the next run.

    Attributes:
        draws: of how many logits tokens are drawn where they lie; None: they are not.
    """

    draws: int | None

    def likeliest(self, row: int) -> int | None:
        """The token with the largest logit; None: look at the logits."""

    def drawn(self, wishes: Mapping[int, Wish]) -> Mapping[int, Choice]:
        """Tokens as these rows wish them; who is not there must look at the logits. Where `draws`."""

    def logits(self, rows: Sequence[int]) -> Iterable[np.ndarray]:
        """`[vocabulary]` fp32 of each of these rows; good until others are asked for."""


class Step(Protocol):
    """Inputs and answers of runs of one shape.

    Attributes:
        rows: of the batch.
        total: of the buffer, as the graph is told.
    """

    rows: int
    total: np.ndarray

    def fill(self, ids: np.ndarray, last: np.ndarray, slots: np.ndarray) -> None:
        """Set the inputs.

        Args:
            ids: `[rows, tokens]`.
            last: `[rows]`, the place of each row's last token in the cache.
            slots: `[rows]`.
        """

    def bind(self, binding: Any) -> None:
        """Bind everything but cache and table to an `onnxruntime.IOBinding`."""

    def upload(self) -> None:
        """Bring the inputs to where the graph reads them."""

    def answers(self) -> Answers:
        """What the run gave."""


class HostStep:
    """Inputs and logits in arrays of the host.

    Args:
        rows: of the batch.
        tokens: of each row.
        total_shape: of the input that has the buffer's length.
        vocabulary: logits of a row.
        switchable: whether rows have slots.
        dtype: of the logits.
        element: ONNX's number of it.
    """

    def __init__(
        self,
        rows: int,
        tokens: int,
        total_shape: tuple[int, ...],
        vocabulary: int,
        switchable: bool,
        dtype: "np.dtype[Any]",
        element: int,
    ) -> None:
        self.rows = rows
        self.total = np.zeros(total_shape, dtype=np.int32)
        self._ids = np.zeros((rows, tokens), dtype=np.int64)
        self._last = np.zeros(rows, dtype=np.int32)
        self._token = last_tokens(rows, tokens)
        self._slot = np.zeros(rows, dtype=np.int64) if switchable else None
        self._logits, self._element = np.zeros((rows, vocabulary), dtype=dtype), element

    def fill(self, ids: np.ndarray, last: np.ndarray, slots: np.ndarray) -> None:
        """As `Step.fill`."""
        self._ids[:], self._last[:] = ids, last
        if self._slot is not None:
            self._slot[:] = slots

    def bind(self, binding: Any) -> None:
        """As `Step.bind`."""
        arrays: dict[str, np.ndarray] = dict(zip(INPUTS, (self._ids, self._last, self.total, self._token), strict=True))
        if self._slot is not None:
            arrays[SLOT] = self._slot
        for name, array in arrays.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        binding.bind_output(LOGITS, "cpu", 0, self._element, self._logits.shape, self._logits.ctypes.data)

    def upload(self) -> None:
        """Nothing to do."""

    def answers(self) -> "HostAnswers":
        """The logits as they lie."""
        return HostAnswers(self._logits)


class HostAnswers:
    """Logits `[rows, vocabulary]` on the host, where nobody needs to be told the largest, nor anything else."""

    draws: int | None = None

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = logits if logits.dtype == np.float32 else logits.astype(np.float32)

    def likeliest(self, row: int) -> None:
        """Not known."""
        return

    def drawn(self, wishes: Mapping[int, Wish]) -> dict[int, Choice]:
        """None."""
        return {}

    def logits(self, rows: Sequence[int]) -> list[np.ndarray]:
        """As `Answers.logits`."""
        return [self._logits[row] for row in rows]


def last_tokens(rows: int, tokens: int) -> np.ndarray:
    """The graph's input `token [rows]` int64: each row's last token among all of them."""
    return np.arange(rows, dtype=np.int64) * tokens + tokens - 1
