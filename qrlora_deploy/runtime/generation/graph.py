"""A decoder's graph: what it takes and keeps, and how it is run."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from qrlora_deploy.errors import FileFormatError
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE
from qrlora_deploy.runtime.generation.cache import CacheShape, KvCache
from qrlora_deploy.runtime.sessions.running import run_bound
from qrlora_deploy.runtime.table.memory import TableMemory

KEYS = re.compile(r"past_key_values\.(\d+)\.key")
INPUTS = ("input_ids", "seqlens_k", "total_sequence_length", "token")
LOGITS = "logits"

ELEMENTS: dict[str, tuple[Any, int]] = {
    "tensor(float)": (np.float32, 1),
    "tensor(float16)": (np.float16, 10),
    "tensor(bfloat16)": (np.uint16, 16),
}
"""By ONNX Runtime's name of a type: how numpy holds it, and ONNX's number of it."""


class DecoderGraph:
    """An open session of a decoder's graph. Runs come one after the other.

    Args:
        session: an `onnxruntime.InferenceSession`.

    Attributes:
        cache_shape: what it keeps of every token.
        vocabulary: logits of a row.
        switchable: whether each row has a slot of a coefficient table.

    Raises:
        FileFormatError: the graph has other inputs or outputs than a decoder.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name: value for value in session.get_outputs()}
        missing = [name for name in INPUTS if name not in inputs] + ([] if LOGITS in outputs else [LOGITS])
        if missing:
            raise FileFormatError(f"this is no decoder's graph: it lacks {', '.join(missing)}")
        self.cache_shape = _cache_shape(inputs)
        self.vocabulary = _size(outputs[LOGITS], 1)
        self.switchable = SLOT in inputs
        self._total_shape = tuple(1 for _ in inputs["total_sequence_length"].shape)
        self._logits_type = outputs[LOGITS].type
        self._bound: dict[tuple[int, int], _Bound] = {}

    def prefill(
        self, cache: KvCache, row: int, tokens: Sequence[int], past: int, slot: int, memory: TableMemory | None
    ) -> np.ndarray:
        """Read tokens of a prompt into a row that holds `past` tokens already.

        Returns:
            The logits `[vocabulary]` fp32 after the last one.

        Raises:
            QrloraError: an operator failed.
        """
        bound = _Bound(self, cache, row, 1, len(tokens))
        # Attention takes tokens without a past for a first prompt only where the lengths are equal.
        bound.total[...] = cache.capacity if past else len(tokens)
        bound.fill(np.array([tokens]), np.array([past + len(tokens) - 1]), np.array([slot]))
        return bound.run(memory)[0].copy()

    def decode(
        self,
        cache: KvCache,
        tokens: np.ndarray,
        past: np.ndarray,
        slots: np.ndarray,
        memory: TableMemory | None,
    ) -> np.ndarray:
        """One token more for the first rows of a cache.

        Args:
            cache: of these rows.
            tokens: `[rows]`, the last token of each.
            past: `[rows]`, how many tokens each holds; the place behind them is written.
            slots: `[rows]`.
            memory: the coefficient table of a switchable graph.

        Returns:
            Logits `[rows, vocabulary]` fp32, which the next run overwrites.

        Raises:
            QrloraError: an operator failed.
        """
        bound = self._decoding(cache, len(tokens))
        bound.fill(tokens[:, None], past, slots)
        return bound.run(memory)

    def _decoding(self, cache: KvCache, rows: int) -> "_Bound":
        key = (cache.capacity, rows)
        bound = self._bound.get(key)
        if bound is None or bound.cache is not cache or bound.generation != cache.generation:
            bound = self._bound[key] = _Bound(self, cache, 0, rows, 1)
            bound.total[...] = cache.capacity
        return bound


class _Bound:
    """Inputs and logits of one shape, bound to a part of a cache."""

    def __init__(self, graph: DecoderGraph, cache: KvCache, first: int, rows: int, tokens: int) -> None:
        self.cache, self.generation = cache, cache.generation
        self._session = graph._session
        self.ids = np.zeros((rows, tokens), dtype=np.int64)
        self.last = np.zeros(rows, dtype=np.int32)
        self.total = np.zeros(graph._total_shape, dtype=np.int32)
        self.token = np.arange(rows, dtype=np.int64) * tokens + tokens - 1
        self.slot = np.zeros(rows, dtype=np.int64)
        dtype, element = ELEMENTS[graph._logits_type]
        self.logits = np.zeros((rows, graph.vocabulary), dtype=dtype)
        self._binding = graph._session.io_binding()
        arrays: dict[str, np.ndarray] = dict(zip(INPUTS, (self.ids, self.last, self.total, self.token), strict=True))
        if graph.switchable:
            arrays[SLOT] = self.slot
        for name, array in arrays.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._binding.bind_output(LOGITS, "cpu", 0, element, self.logits.shape, self.logits.ctypes.data)
        cache.bind(self._binding, first, rows)
        self._memory: TableMemory | None = None

    def fill(self, ids: np.ndarray, last: np.ndarray, slots: np.ndarray) -> None:
        self.ids[:], self.last[:], self.slot[:] = ids, last, slots

    def run(self, memory: TableMemory | None) -> np.ndarray:
        if memory is not None and memory is not self._memory:
            # Held while it is bound: a table that grows would be given back.
            self._memory = memory
            memory.bind(self._binding)
        run_bound(self._session, self._binding)
        return self.logits if self.logits.dtype == np.float32 else self.logits.astype(np.float32)


def _cache_shape(inputs: dict[str, Any]) -> CacheShape:
    keys = [name for name in inputs if KEYS.fullmatch(name)]
    if not keys or TABLE in inputs and SLOT not in inputs:
        raise FileFormatError("this is no decoder's graph: it has no past_key_values, or a table and no slot")
    first = inputs[keys[0]]
    if first.type not in ELEMENTS:
        raise FileFormatError(f"this decoder keeps its cache as {first.type}, which is none of {', '.join(ELEMENTS)}")
    dtype, element = ELEMENTS[first.type]
    return CacheShape(len(keys), _size(first, 1), _size(first, 3), np.dtype(dtype), element)


def _size(value: Any, axis: int) -> int:
    size = value.shape[axis] if axis < len(value.shape) else None
    if not isinstance(size, int) or size < 1:
        raise FileFormatError(f"this is no decoder's graph: {value.name} has no fixed size along its axis {axis}")
    return size
