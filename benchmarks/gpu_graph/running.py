"""Bound sessions and PyTorch peers, timed from inputs on the device and from inputs on the host."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks.gpu_graph.shapes import Inputs
from qrlora_deploy.runtime.bundle.bundle import ALONE_FILE, MERGE_FILE
from qrlora_deploy.runtime.bundle.row_layout import MERGED, SLOT, TABLE
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.packed_tokens import (
    aligned_length,
    dtype_of,
    is_packed,
    packed_names,
    packed_shapes,
    packed_size,
    write_packed,
)
from qrlora_deploy.runtime.sessions.session import open_session
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, kept_tokens, padded_tokens, write_tokens


@dataclass(frozen=True)
class Contender:
    """Something that answers one batch.

    Attributes:
        device: runs with inputs and logits on the device.
        whole: the same from numpy inputs to numpy logits.
        tokens: that its blocks compute on.
    """

    name: str
    device: Callable[[], None]
    whole: Callable[[], np.ndarray]
    tokens: int


class Graph:
    """An ONNX file, opened when it is first needed and once.

    Args:
        path: of the file.
        table: `[slots, width]` fp32 of a switchable graph; row r of a batch gets slot r + 1.
        one: every row gets slot 1.
        sdpa: as `Variant.sdpa`.
    """

    def __init__(self, path: Path, table: np.ndarray | None, one: bool = False, sdpa: int | None = None) -> None:
        self.path, self.table, self.one = path, table, one
        self._options = {} if sdpa is None else {"sdpa_kernel": str(sdpa)}
        self._weights: dict[str, np.ndarray] = {}
        self._session: Any = None
        self._bound = 0

    def bind(self, inputs: Inputs, device: str, threads: int | None = None) -> "BoundGraph":
        """The graph with one batch, which on CUDA is captured as a graph of its own."""
        if self._session is None:
            options = self._options if device == "cuda" else {}
            place = Device(device, provider_options=options)
            self._session = open_session(self.path, place, threads, cuda_graph=device == "cuda")
        self._bound += 1
        table, further = self.table, self._merged(device, threads)
        if table is not None:
            batch = len(inputs["attention_mask"])
            slots = np.ones(batch, dtype=np.int64) if self.one else np.arange(1, batch + 1, dtype=np.int64)
            further = further or {TABLE: table, SLOT: slots}
        return BoundGraph(self._session, inputs, device, further, str(self._bound))

    def _merged(self, device: str, threads: int | None) -> dict[str, np.ndarray]:
        """The merged weights of slot 1, where they are inputs of the graph."""
        if not self._weights and self.path.name == ALONE_FILE and self.table is not None:
            merge = open_session(self.path.parent / MERGE_FILE, device, threads)
            names = [value.name for value in merge.get_outputs()]
            made = merge.run(None, {TABLE: self.table, SLOT: np.ones(1, dtype=np.int64)})
            self._weights = dict(zip(names, made, strict=True))
        return self._weights

    def merge_ms(self, device: str, threads: int | None, runs: int = 20) -> float | None:
        """Median of making the merged weights of a customer on the device; None where there are none."""
        if self.path.name != ALONE_FILE or self.table is None:
            return None
        merge = open_session(self.path.parent / MERGE_FILE, device, threads)
        table = pinned(self.table, device).to(device)
        binding = merge.io_binding()
        binding.bind_input(TABLE, device, 0, np.float32, list(table.shape), table.data_ptr())
        binding.bind_cpu_input(SLOT, np.ones(1, dtype=np.int64))
        for value in merge.get_outputs():
            binding.bind_output(value.name, device)
        taken = []
        for _ in range(runs):
            begin = time.perf_counter()
            merge.run_with_iobinding(binding)
            taken.append(1e3 * (time.perf_counter() - begin))
        return median(taken)


class BoundGraph:
    """A session with one set of fixed inputs, so that CUDA can capture it.

    Args:
        session: of the graph.
        inputs: the batch, on the host.
        device: "cpu" or "cuda".
        further: inputs that are not of the text.
        number: `gpu_graph_id`.
    """

    def __init__(self, session: Any, inputs: Inputs, device: str, further: dict[str, np.ndarray], number: str) -> None:
        self.device = device
        self.session = session
        self.batch = inputs
        batch, length = inputs["attention_mask"].shape
        feeds: dict[str, np.ndarray] = dict(inputs)
        names = {value.name for value in self.session.get_inputs()}
        self.tokens = batch * length
        self.packed = is_packed(session)
        if self.packed:
            self.tokens = packed_size(int(inputs["attention_mask"].sum()), batch, length)
            shapes = packed_shapes(packed_names(session), batch, aligned_length(length), self.tokens)
            feeds = {name: np.zeros(shape, dtype_of(name)) for name, shape in shapes.items()}
            write_packed(feeds, inputs)
        if TOKEN_INDEX in names:
            self.tokens = padded_tokens(len(kept_tokens(inputs["attention_mask"])), batch, length)
            feeds[TOKEN_INDEX] = np.zeros(self.tokens, dtype=np.int64)
        feeds |= further
        self.host = {name: pinned(feeds[name], device) for name in names}
        self.place = {name: tensor.to(device).contiguous() for name, tensor in self.host.items()}
        outputs = int(self.session.get_outputs()[0].shape[1])
        self.logits = torch.zeros(batch, outputs, dtype=torch.float32, device=device)
        self.options = onnxruntime.RunOptions()
        if device == "cuda":
            self.options.add_run_config_entry("gpu_graph_id", number)
        self.binding = self.session.io_binding()
        for name, tensor in self.place.items():
            dtype = self.host[name].numpy().dtype
            self.binding.bind_input(name, device, 0, dtype, list(tensor.shape), tensor.data_ptr())
        self.binding.bind_output("logits", device, 0, np.float32, list(self.logits.shape), self.logits.data_ptr())

    def run(self) -> None:
        """One run on what is on the device; done when it returns."""
        self.session.run_with_iobinding(self.binding, self.options)

    def whole(self) -> np.ndarray:
        """What a server does with a batch: count the tokens, copy, run, copy back."""
        if self.packed:
            write_packed({name: self.host[name].numpy() for name in packed_names(self.session)}, self.batch)
        else:
            for name, values in self.batch.items():
                self.host[name].numpy()[:] = values
        if TOKEN_INDEX in self.host:
            write_tokens(self.host[TOKEN_INDEX].numpy(), kept_tokens(self.batch["attention_mask"]))
        for name, tensor in self.host.items():
            if name != TABLE and not name.startswith(MERGED):
                self.place[name].copy_(tensor, non_blocking=True)
        wait(self.device)
        self.run()
        logits: np.ndarray = self.logits.cpu().numpy()
        return logits

    def contender(self, name: str) -> Contender:
        """To be timed."""
        return Contender(name, self.run, self.whole, self.tokens)


def torch_contender(name: str, model: Any, inputs: Inputs, device: str, compiled: bool) -> Contender:
    """PyTorch on the padded batch; compiled with CUDA graphs on a GPU."""
    batch, length = inputs["attention_mask"].shape
    host = {key: pinned(values, device) for key, values in inputs.items()}
    place = {key: tensor.to(device) for key, tensor in host.items()}
    mode = "reduce-overhead" if device == "cuda" else "default"
    call = torch.compile(model, mode=mode, dynamic=False) if compiled else model

    def answer() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = call(**place).logits
        wait(device)
        return logits

    def whole() -> np.ndarray:
        for key, values in inputs.items():
            host[key].numpy()[:] = values
            place[key].copy_(host[key], non_blocking=True)
        logits: np.ndarray = answer().float().cpu().numpy()
        return logits

    def run() -> None:
        answer()

    return Contender(name, run, whole, batch * length)


def pinned(values: np.ndarray, device: str) -> torch.Tensor:
    """A copy of an array, which for a GPU lies where it is copied from fastest."""
    tensor = torch.from_numpy(np.array(values))
    return tensor.pin_memory() if device == "cuda" else tensor


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
