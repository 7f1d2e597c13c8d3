"""Graphs that the exporter writes, run with everything on the device: a prompt is read, then tokens are written one by
one, each the likeliest, by replays of a CUDA graph.

The runtime's own session does more for each token: requests come and go, and answers are turned into text. This is
what the graph alone takes, as the peers' loops are theirs alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from exporters.onnx.decoder.graph import Plan, write_decoder
from exporters.onnx.decoder.shape import read_shape
from exporters.onnx.decoder.tensors import Tensors
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE, TableLayout
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.session import open_session

NUMPY: dict[torch.dtype, Any] = {
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.float16: np.float16,
    torch.float32: np.float32,
}
WITHOUT_GRAPH = "-1"
"""The `gpu_graph_id` of runs that are not captured: prompts."""
WARM_RUNS = 4
"""After these the host waits, so that what a run holds is free when the next one is captured."""


@dataclass(frozen=True)
class Made:
    """A graph on the disk, and who is in its table.

    Attributes:
        basis: of its branches; without targets: it has none.
        table: `[customers, width]` fp32 on the device; None: it has no branches.
        operators: nodes of the file.
    """

    name: str
    file: Path
    basis: Basis
    table: torch.Tensor | None
    operators: int


def write_graph(
    folder: Path, name: str, checkpoint: Checkpoint, basis: Basis, customers: np.ndarray, device: str, bits: int = 0
) -> Made:
    """Build a graph by the exporter's own code: fp16 on CUDA, fp32 on the CPU.

    Args:
        customers: `[customers, total_rank]`.
        bits: of the base's weights; 0: they are not quantised.
    """
    folder.mkdir()
    tensors = Tensors(checkpoint.stored, checkpoint.name)
    values = None if basis.targets else np.zeros(0, dtype=np.float32)
    dtype = np.float16 if device == "cuda" else np.float32
    plan = Plan(read_shape(checkpoint.config, checkpoint.name), tensors, basis, values, dtype, bits=bits)
    model = write_decoder(plan, folder, "model.onnx")
    table = None
    if basis.targets:
        layout = TableLayout(list(basis.ranks.values()))
        table = torch.from_numpy(np.stack([layout.row(one) for one in customers])).to(device)
    return Made(name, folder / "model.onnx", basis, table, len(model.graph.node))


def open_graph(made: Made, device: str, threads: int | None = None) -> Any:
    """A session of the product's, on PyTorch's stream on CUDA, so that neither waits for the other."""
    if device != "cuda":
        return open_session(made.file, device, threads)
    stream = {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
    return open_session(made.file, Device("cuda", 0, stream, _tune), cuda_graph=True)


def _tune(options: Any) -> None:
    """Products take the fastest of ONNX Runtime's kernels, which it finds in the first run."""
    options.add_session_config_entry("ep.cuda.enable_gemm_auto_tune", "1")


class Writer:
    """Rows of one length or of several that are read at once and then written on.

    Args:
        session: of a graph.
        device: "cpu" or "cuda".
        rows: of the batch.
        prompt: tokens of the longest prompt.
        new: tokens that are written.
        table: of the customers; None: the graph has no branches.
        slots: `[rows]`, whose each row is.
        lengths: of the prompts; None: all are the longest.
        number: `gpu_graph_id`; another one for every writer of a session.
        clock: by which it is timed.
    """

    def __init__(
        self,
        session: Any,
        device: str,
        rows: int,
        prompt: int,
        new: int,
        table: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        lengths: list[int] | None = None,
        number: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._session, self._device, self.new, self._prompt, self._clock = session, device, new, prompt, clock
        self._lengths = torch.tensor(lengths or [prompt] * rows, device=device, dtype=torch.int32)
        self._first = torch.arange(rows, device=device)
        self._ids = torch.zeros(rows, prompt, dtype=torch.int64, device=device)
        self._last = torch.zeros(rows, dtype=torch.int32, device=device)
        self._token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, session.get_outputs()[0].shape[1], device=device)
        self._cache = self._make_cache(rows, prompt + new)
        self._further = {} if table is None or slots is None else {TABLE: table, SLOT: slots}
        self._kept: list[Any] = []
        self._runs = 0
        self._reading = self._bind(self._ids, prompt), self._options(WITHOUT_GRAPH)
        self._writing = self._bind(self.chosen, prompt + new), self._options(str(number))

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read prompts `[rows, prompt]`, padded on the right; gives the logits, which the next run overwrites."""
        self._ids.copy_(ids)
        self._last.copy_(self._lengths - 1)
        self._token.copy_(self._first * self._prompt + self._lengths - 1)
        self._run(*self._reading)
        self._token.copy_(self._first)
        return self.logits

    def write(self, forced: torch.Tensor | None = None) -> torch.Tensor:
        """One token more in every row: what the graph chose, or `forced [rows, 1]`."""
        if forced is not None:
            self.chosen.copy_(forced)
        self._last += 1
        self._run(*self._writing)
        return self.logits

    def timed(self, ids: torch.Tensor) -> tuple[float, float]:
        """Seconds of reading the prompts, and of each token that was written."""
        wait(self._device)
        start = self._clock()
        self.read(ids)
        wait(self._device)
        read = self._clock()
        for _ in range(self.new - 1):
            self.write()
        wait(self._device)
        return read - start, (self._clock() - read) / (self.new - 1)

    def _run(self, binding: Any, options: Any) -> None:
        self._session.run_with_iobinding(binding, options)
        self._runs += 1
        if self._runs <= WARM_RUNS:
            wait(self._device)

    def _make_cache(self, rows: int, buffer: int) -> dict[str, torch.Tensor]:
        past = [value for value in self._session.get_inputs() if value.name.startswith("past_key_values")]
        dtype = torch.float16 if "float16" in past[0].type else torch.float32
        return {
            value.name: torch.zeros(rows, value.shape[1], buffer, value.shape[3], dtype=dtype, device=self._device)
            for value in past
        }

    def _options(self, number: str) -> Any:
        options = onnxruntime.RunOptions()
        if self._device == "cuda":
            options.add_run_config_entry("gpu_graph_id", number)
            # One stream for both: what comes later waits for what came before without the host.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _bind(self, ids: torch.Tensor, total: int) -> Any:
        binding = self._session.io_binding()

        def place(tensor: torch.Tensor) -> tuple[Any, ...]:
            return self._device, 0, NUMPY[tensor.dtype], list(tensor.shape), tensor.data_ptr()

        inputs = {"input_ids": ids, "seqlens_k": self._last, "token": self._token, **self._further, **self._cache}
        for name, tensor in inputs.items():
            binding.bind_input(name, *place(tensor))
        length = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([total], dtype=np.int32))
        self._kept.append(length)
        binding.bind_ortvalue_input("total_sequence_length", length)
        for name, tensor in self._cache.items():
            binding.bind_output(name.replace("past_key_values", "present", 1), *place(tensor))
        binding.bind_output("logits", *place(self.logits))
        # Where the next step reads it.
        binding.bind_output("greedy", *place(self.chosen.view(-1)))
        return binding


def wait(device: str) -> None:
    """Until the GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
