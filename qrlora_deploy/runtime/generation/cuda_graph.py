"""A decoder's graph on a GPU: caches stay there, and runs that come again are captured and replayed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime

from qrlora_deploy.runtime.generation.budget import refused_without_memory
from qrlora_deploy.runtime.generation.cuda_cache import CudaKvCache
from qrlora_deploy.runtime.generation.cuda_draw import CudaDrawer
from qrlora_deploy.runtime.generation.cuda_step import CudaAnswers, CudaStep, CudaStepMemory, Sizes
from qrlora_deploy.runtime.generation.graph import DecoderGraph, _Bound
from qrlora_deploy.runtime.table.memory import TableMemory

NO_GRAPH = "-1"
"""`gpu_graph_id` of a run that is not to be captured."""

MOST_GRAPHS = 4096
"""Captured graphs at most: ONNX Runtime keeps those of caches and tables that are gone. Then runs are as they come."""

SMALLEST_PIECE = 16
"""Tokens of the shortest piece of a prompt that is run; then each size is half as large again, or a third."""


class CudaDecoderGraph(DecoderGraph):
    """An open session of a decoder's graph on a GPU. All runs are of one thread: captured graphs are the thread's.

    Args:
        session: an `onnxruntime.InferenceSession`, opened with `cuda_graph` where runs are captured.
        device: number of the GPU.
        rows: of a batch at most.
        block_tokens: tokens of a prompt that are read in one run, at most.
        captured: whether runs are captured that write a token, a graph for each batch of each capacity, and those that
            read a prompt's beginning, a graph for each of a few lengths.
        open_drawing: opens what draws tokens of a vocabulary where the logits lie, `CudaDrawer`'s sessions; None: the
            host draws.

    Raises:
        FileFormatError: the graph has other inputs or outputs than a decoder.
        MemoryError: the GPU has no room for a batch's logits, or for a prompt's block.
    """

    def __init__(
        self,
        session: Any,
        device: int,
        rows: int,
        block_tokens: int,
        captured: bool = True,
        open_drawing: Callable[[int], tuple[Any, Any]] | None = None,
    ) -> None:
        super().__init__(session)
        dtype, element = self._logits_type
        sizes = Sizes(
            rows,
            max(rows, block_tokens),
            self.vocabulary,
            np.dtype(dtype),
            element,
            self.switchable,
            self.chooses,
            self._total_shape,
        )
        self._memory, self._captured, self._graphs = CudaStepMemory(sizes, device), captured, 0
        self._drawer = None
        if open_drawing is not None and dtype is np.float32:
            drawing, logits = open_drawing(self.vocabulary), self._memory.logits.pointer
            self._drawer = CudaDrawer(drawing, device, logits, rows, self.vocabulary, captured)
        self._lengths = piece_lengths(block_tokens)
        self._first = CudaKvCache(self.cache_shape, block_tokens, device)
        if captured:
            self._first.resize(1)

    def prefill(  # type: ignore[override]
        self, cache: CudaKvCache, row: int, tokens: Sequence[int], past: int, slot: int, memory: TableMemory | None
    ) -> CudaAnswers:
        """As `DecoderGraph.prefill`, filled up to one of few lengths.

        ONNX Runtime plans attention anew for each length, which takes longer than many runs. What is filled up stands
        behind the prompt, so no token of it sees that, and the next tokens take its place.
        """
        size = next(size for size in self._lengths if size >= len(tokens))
        begins = self._captured and not past
        if not begins and past + size > cache.capacity:
            size = len(tokens)
        ids = np.zeros((1, size), dtype=np.int64)
        ids[0, : len(tokens)] = tokens
        with refused_without_memory(1):
            bound: Any = self._beginning(size, memory) if begins else self._going_on(cache, row, size, past)
            bound.step.token[0] = len(tokens) - 1
            bound.step.fill(ids, np.array([past + size - 1]), np.array([slot]))
            answers: CudaAnswers = bound.run(memory)
            if begins:
                cache.take(row, self._first, len(tokens))
            return answers

    def _beginning(self, size: int, memory: TableMemory | None) -> _Bound:
        """A captured run that reads so many tokens of a prompt's beginning into a row of its own."""
        return self._kept(("read", size), self._first, (1, size), size, memory)

    def _going_on(self, cache: CudaKvCache, row: int, size: int, past: int) -> _Bound:
        """A run that reads so many tokens where they belong."""
        bound = _Bound(self._session, self._step_of(1, size), cache, row, self._single_options())
        bound.step.total[...] = cache.capacity if past else size
        return bound

    def _step_of(self, rows: int, tokens: int) -> CudaStep:
        return CudaStep(self._memory, rows, tokens, self._drawer)

    def _single_options(self) -> Any:
        return self._options(NO_GRAPH)

    def _kept_options(self) -> Any:
        if self._graphs == MOST_GRAPHS:
            return self._options(NO_GRAPH)
        self._graphs += 1
        return self._options(str(self._graphs))

    def _options(self, graph: str) -> Any:
        options = onnxruntime.RunOptions()
        if self._captured:
            options.add_run_config_entry("gpu_graph_id", graph)
        return options


def piece_lengths(most: int) -> tuple[int, ...]:
    """Lengths up to which pieces of prompts are filled up: 16, 24, 32, 48 and so on, and `most`."""
    powers = [SMALLEST_PIECE * 2**power for power in range(most.bit_length())]
    return tuple(sorted({most, *(size for power in powers for size in (power, power * 3 // 2) if size < most)}))
