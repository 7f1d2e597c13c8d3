"""A decoder's graph: what it takes and keeps, and how it is run."""

import re
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from qrlora_deploy.errors import FileFormatError
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE
from qrlora_deploy.runtime.generation.budget import refused_without_memory
from qrlora_deploy.runtime.generation.cache import CacheShape
from qrlora_deploy.runtime.generation.stepping import GREEDY, INPUTS, LOGITS, Answers, HostStep, Step
from qrlora_deploy.runtime.host.captures import CAPTURES
from qrlora_deploy.runtime.sessions.running import run_bound
from qrlora_deploy.runtime.table.memory import TableMemory

KEYS = re.compile(r"past_key_values\.(\d+)\.key")

ELEMENTS: dict[str, tuple[Any, int]] = {
    "tensor(float)": (np.float32, 1),
    "tensor(float16)": (np.float16, 10),
    "tensor(bfloat16)": (np.uint16, 16),
}
"""By ONNX Runtime's name of a type: how numpy holds it, and ONNX's number of it."""


class Cache(Protocol):
    """Rows of one capacity, as far as a run needs them: `KvCache` or `CudaKvCache`."""

    capacity: int
    generation: int

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Give `count` rows from `first` on to an `onnxruntime.IOBinding`, as past and as present."""


class DecoderGraph:
    """An open session of a decoder's graph. Runs come one after the other.

    Args:
        session: an `onnxruntime.InferenceSession`.

    Attributes:
        cache_shape: what it keeps of every token.
        vocabulary: logits of a row.
        switchable: whether each row has a slot of a coefficient table.
        chooses: whether it tells the likeliest token of each row besides.

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
        self.chooses = GREEDY in outputs
        self._total_shape = tuple(1 for _ in inputs["total_sequence_length"].shape)
        self._logits_type = ELEMENTS[outputs[LOGITS].type]
        self._bound: dict[Hashable, _Bound] = {}

    def prefill(
        self, cache: Cache, row: int, tokens: Sequence[int], past: int, slot: int, memory: TableMemory | None
    ) -> Answers:
        """Read tokens of a prompt into a row that holds `past` tokens already.

        Returns:
            What one row gave after the last one, until the next run.

        Raises:
            CacheFullError: there was no memory for what is computed on the way.
            QrloraError: an operator failed.
        """
        with refused_without_memory(1):
            bound = _Bound(self._session, self._step_of(1, len(tokens)), cache, row, self._single_options())
            # Attention takes tokens without a past for a first prompt only where the lengths are equal.
            bound.step.total[...] = cache.capacity if past else len(tokens)
            bound.step.fill(np.array([tokens]), np.array([past + len(tokens) - 1]), np.array([slot]))
            return bound.run(memory)

    def decode(
        self,
        cache: Cache,
        tokens: np.ndarray,
        past: np.ndarray,
        slots: np.ndarray,
        memory: TableMemory | None,
    ) -> Answers:
        """One token more for the first rows of a cache.

        Args:
            cache: of these rows.
            tokens: `[rows]`, the last token of each.
            past: `[rows]`, how many tokens each holds; the place behind them is written.
            slots: `[rows]`.
            memory: the coefficient table of a switchable graph.

        Returns:
            What each row gave, until the next run.

        Raises:
            CacheFullError: there was no memory for what is computed on the way.
            QrloraError: an operator failed.
        """
        with refused_without_memory(len(tokens)):
            bound = self._decoding(cache, len(tokens), memory)
            bound.step.fill(tokens[:, None], past, slots)
            return bound.run(memory)

    def _decoding(self, cache: Cache, rows: int, memory: TableMemory | None) -> "_Bound":
        return self._kept(("write", cache.capacity, rows), cache, (rows, 1), cache.capacity, memory)

    def _kept(
        self, key: Hashable, cache: Cache, shape: tuple[int, int], total: int, memory: TableMemory | None
    ) -> "_Bound":
        """What is bound to the first rows of a cache, as it was before where everything is where it was."""
        bound = self._bound.get(key)
        if bound is None or not bound.serves(cache, memory):
            # A table that has grown lies elsewhere: what is bound to the old one is all that keeps it in memory.
            self._bound = {key: other for key, other in self._bound.items() if other.memory is memory}
            step, options = self._step_of(*shape), self._kept_options()
            bound = self._bound[key] = _Bound(self._session, step, cache, 0, options, captures=options is not None)
            bound.step.total[...] = total
        return bound

    def _step_of(self, rows: int, tokens: int) -> Step:
        """Inputs and answers of a run."""
        dtype, element = self._logits_type
        return HostStep(rows, tokens, self._total_shape, self.vocabulary, self.switchable, np.dtype(dtype), element)

    def _single_options(self) -> Any:
        """ONNX Runtime's options of a run that is bound for itself."""
        return None

    def _kept_options(self) -> Any:
        """ONNX Runtime's options of runs that come again, bound as they are."""
        return None


class _Bound:
    """A step, bound to a part of a cache; on a GPU its first run may be one that is captured."""

    def __init__(
        self, session: Any, step: Step, cache: Cache, first: int, options: Any, captures: bool = False
    ) -> None:
        self.step, self.cache, self.generation = step, cache, cache.generation
        self._session, self._options, self._captures = session, options, captures
        self._binding = session.io_binding()
        step.bind(self._binding)
        cache.bind(self._binding, first, step.rows)
        self.memory: TableMemory | None = None

    def serves(self, cache: Cache, memory: TableMemory | None) -> bool:
        """Whether all is where it was: captured graphs keep addresses."""
        return self.cache is cache and self.generation == cache.generation and self.memory is memory

    def run(self, memory: TableMemory | None) -> Answers:
        """Run with what was filled in."""
        if memory is not None and memory is not self.memory:
            # Held while it is bound: a table that grows would be given back.
            self.memory = memory
            memory.bind(self._binding)
        self.step.upload()
        # Runs on a GPU have options.
        with CAPTURES.of(self._options is not None, self._captures):
            run_bound(self._session, self._binding, self._options)
        self._captures = False
        return self.step.answers()


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
