"""A decoder's graph on a GPU: caches stay there, and runs that write are captured and replayed."""

from typing import Any

import numpy as np
import onnxruntime

from qrlora_deploy.runtime.generation.cuda_step import CudaStep, CudaStepMemory, Sizes
from qrlora_deploy.runtime.generation.graph import DecoderGraph

NO_GRAPH = "-1"
"""`gpu_graph_id` of a run that is not to be captured."""

MOST_GRAPHS = 4096
"""Captured graphs at most: ONNX Runtime keeps those of caches and tables that are gone. Then runs are as they come."""


class CudaDecoderGraph(DecoderGraph):
    """An open session of a decoder's graph on a GPU. All runs are of one thread: captured graphs are the thread's.

    Args:
        session: an `onnxruntime.InferenceSession`, opened with `cuda_graph` where runs are captured.
        device: number of the GPU.
        rows: of a batch at most.
        block_tokens: tokens of a prompt that are read in one run, at most.
        captured: whether runs that write a token are captured, a graph for each batch of each capacity.

    Raises:
        FileFormatError: the graph has other inputs or outputs than a decoder.
        MemoryError: the GPU has no room for a batch's logits.
    """

    def __init__(self, session: Any, device: int, rows: int, block_tokens: int, captured: bool = True) -> None:
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

    def _step_of(self, rows: int, tokens: int) -> CudaStep:
        return CudaStep(self._memory, rows, tokens)

    def _reading_options(self) -> Any:
        return self._options(NO_GRAPH)

    def _writing_options(self) -> Any:
        if self._graphs == MOST_GRAPHS:
            return self._options(NO_GRAPH)
        self._graphs += 1
        return self._options(str(self._graphs))

    def _options(self, graph: str) -> Any:
        options = onnxruntime.RunOptions()
        if self._captured:
            options.add_run_config_entry("gpu_graph_id", graph)
        return options
