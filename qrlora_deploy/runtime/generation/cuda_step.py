"""What one run of a decoder takes and gives, on a GPU: some bytes go there and come back, logits only where they are
asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrlora_deploy.runtime.bundle.row_layout import SLOT
from qrlora_deploy.runtime.generation.cuda_arrays import CudaArrays
from qrlora_deploy.runtime.generation.cuda_draw import CudaDrawer
from qrlora_deploy.runtime.generation.sampling import Choice
from qrlora_deploy.runtime.generation.stepping import GREEDY, LOGITS, last_tokens
from qrlora_deploy.runtime.generation.wishes import Wish
from qrlora_deploy.runtime.table.cuda import DEVICE_TO_HOST, CudaBuffer, Pieces, pinned_bytes

FIRST = "first"
"""The first logit of each row, on the host: NaN where the model has failed, as all of the row's then are."""

DTYPES: dict[str, Any] = {
    "input_ids": np.int64,
    "seqlens_k": np.int32,
    "token": np.int64,
    SLOT: np.int64,
    GREEDY: np.int64,
    FIRST: np.float32,
}
TAKEN = ("input_ids", "seqlens_k", "token", SLOT)


@dataclass(frozen=True)
class Sizes:
    """Of what goes in and comes out.

    Attributes:
        rows: of a batch at most.
        tokens: of a batch at most.
        vocabulary: logits of a row.
        dtype: of the logits.
        element: ONNX's number of it.
        switchable: whether rows have slots.
        chooses: whether the graph tells the likeliest tokens.
        total_shape: of the input that has the buffer's length.
    """

    rows: int
    tokens: int
    vocabulary: int
    dtype: "np.dtype[Any]"
    element: int
    switchable: bool
    chooses: bool
    total_shape: tuple[int, ...]


class CudaStepMemory:
    """Memory of the inputs and answers of all runs of a graph, which come one after the other.

    It lies where it is from the first run to the last: captured graphs keep addresses.

    Args:
        sizes: of the largest runs.
        device: number of the GPU.

    Attributes:
        arrays: what is copied whole, of the largest runs.
        host: of them, by name, pinned memory of the host.
        pointers: of them, by name, addresses on the GPU.
        copies: to and from the GPU.
        logits: of the rows, on the GPU.
        row_bytes: of a row's logits.
    """

    def __init__(self, sizes: Sizes, device: int) -> None:
        self.sizes, self.device = sizes, device
        lengths = dict.fromkeys(DTYPES, sizes.rows) | {"input_ids": sizes.tokens}
        self.arrays = CudaArrays({name: (DTYPES[name], lengths[name]) for name in DTYPES}, device)
        self.host, self.pointers, self.copies = self.arrays.host, self.arrays.pointers, self.arrays.copies
        self.row_bytes = sizes.vocabulary * sizes.dtype.itemsize
        self.logits = CudaBuffer(sizes.rows * self.row_bytes, device, self.copies)
        self._rows = np.zeros(0, dtype=np.uint8)

    def host_logits(self, rows: int) -> tuple[np.ndarray, int]:
        """Pinned memory `[rows, vocabulary]` of the host, and its address."""
        if len(self._rows) < rows * self.row_bytes:
            # Twice as much each time, so that it is made a few times alone.
            more = min(self.sizes.rows, 2 * rows)
            self._rows = pinned_bytes(more * self.row_bytes, self.device)
        found = self._rows[: rows * self.row_bytes].view(self.sizes.dtype).reshape(rows, self.sizes.vocabulary)
        return found, self._rows.ctypes.data


class CudaStep:
    """Inputs and answers of runs of one shape.

    Args:
        memory: of all runs.
        rows: of the batch.
        tokens: of each row.
        drawer: of tokens where the logits lie, if there is one.

    Attributes:
        token: `[rows]`, of all tokens the one of each row whose logits are wanted: its last one, or one before.
    """

    def __init__(self, memory: CudaStepMemory, rows: int, tokens: int, drawer: CudaDrawer | None = None) -> None:
        self.rows, self._tokens, self._memory, self._drawer = rows, tokens, memory, drawer
        self.total = np.zeros(memory.sizes.total_shape, dtype=np.int32)
        self.token = last_tokens(rows, tokens)

    def fill(self, ids: np.ndarray, last: np.ndarray, slots: np.ndarray) -> None:
        """As `Step.fill`."""
        values = {"input_ids": ids.ravel(), "seqlens_k": last, "token": self.token, SLOT: slots}
        for name, array in values.items():
            self._memory.host[name][: len(array)] = array

    def bind(self, binding: Any) -> None:
        """As `Step.bind`."""
        memory, rows = self._memory, self.rows
        sizes = memory.sizes
        shapes = {"input_ids": (rows, self._tokens), "seqlens_k": (rows,), "token": (rows,)}
        if sizes.switchable:
            shapes[SLOT] = (rows,)
        for name, shape in shapes.items():
            binding.bind_input(name, "cuda", memory.device, DTYPES[name], shape, memory.pointers[name])
        # Attention reads this one on the host.
        binding.bind_input(
            "total_sequence_length", "cpu", 0, self.total.dtype, self.total.shape, self.total.ctypes.data
        )
        shape = (rows, sizes.vocabulary)
        binding.bind_output(LOGITS, "cuda", memory.device, sizes.element, shape, memory.logits.pointer)
        if sizes.chooses:
            binding.bind_output(GREEDY, "cuda", memory.device, DTYPES[GREEDY], (rows,), memory.pointers[GREEDY])

    def upload(self) -> None:
        """All inputs in one copy."""
        self._memory.arrays.upload(TAKEN)

    def answers(self) -> "CudaAnswers":
        """What the run left on the GPU."""
        return CudaAnswers(self._memory, self.rows, self._drawer)


class CudaAnswers:
    """What a run left on the GPU, which comes when it is asked for."""

    def __init__(self, memory: CudaStepMemory, rows: int, drawer: CudaDrawer | None) -> None:
        self._memory, self._rows, self._drawer = memory, rows, drawer
        self.draws = None if drawer is None else memory.sizes.vocabulary
        self._likeliest: list[int | None] | None = None

    def likeliest(self, row: int) -> int | None:
        """As `Answers.likeliest`; those of all rows come at once."""
        if not self._memory.sizes.chooses:
            return None
        if self._likeliest is None:
            self._likeliest = self._fetch()
        return self._likeliest[row]

    def drawn(self, wishes: Mapping[int, Wish]) -> dict[int, Choice]:
        """As `Answers.drawn`."""
        return {} if self._drawer is None else self._drawer.draw(self._rows, wishes)

    def logits(self, rows: Sequence[int]) -> np.ndarray:
        """As `Answers.logits`."""
        memory = self._memory
        found, address = memory.host_logits(len(rows))
        for place, row in enumerate(rows):
            here, there = address + place * memory.row_bytes, memory.logits.pointer + row * memory.row_bytes
            memory.copies.begin_copy(here, there, memory.row_bytes, DEVICE_TO_HOST)
        memory.copies.wait()
        return found if found.dtype == np.float32 else found.astype(np.float32)

    def _fetch(self) -> list[int | None]:
        memory, sizes, rows = self._memory, self._memory.sizes, self._rows
        memory.arrays.begin_download(GREEDY, rows)
        if sizes.dtype == np.float32:
            target, source = Pieces(memory.arrays.addresses[FIRST], 4), Pieces(memory.logits.pointer, memory.row_bytes)
            memory.copies.begin_pieces(target, source, 4, rows, DEVICE_TO_HOST)
        memory.copies.wait()
        tokens, finite = memory.host[GREEDY][:rows].tolist(), np.isfinite(memory.host[FIRST][:rows]).tolist()
        return [token if usable else None for token, usable in zip(tokens, finite, strict=True)]
