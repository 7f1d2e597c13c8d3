"""Runs in fixed shapes: on CUDA each one is a captured graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from qrlora_deploy.runtime.bundle.bundle import Manifest
from qrlora_deploy.runtime.bundle.row_layout import SLOT
from qrlora_deploy.runtime.host.captures import CAPTURES
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.layouts import layout_of
from qrlora_deploy.runtime.sessions.packed_tokens import dtype_of
from qrlora_deploy.runtime.sessions.running import Bindable, Inputs, PlainRunner, Tables, run_bound, text_inputs
from qrlora_deploy.runtime.sessions.worker import Worker
from qrlora_deploy.runtime.table.cuda import DEVICE_TO_HOST, HOST_TO_DEVICE, CudaBuffer, pinned_bytes

LOGITS = "logits"
"""What the answers are called here, whatever the graph's output is."""

ALIGNMENT = 256
"""Of every input in a bucket's buffer, in bytes: what CUDA's own allocations have."""

NO_GRAPH = "-1"
"""`gpu_graph_id` of a run that is not to be captured."""


class BucketRunner:
    """Runs batches padded up to fixed shapes, one after the other in a thread of its own.

    On CUDA each bucket is a captured graph, which takes its launches off the processor. ONNX
    Runtime keeps captured graphs by thread, and the memory between their operators is shared with
    every other run, so no two runs may overlap: hence the thread. What fits no bucket runs there
    as it is. A padding-free or packed graph also has a number of tokens, rounded up (`padded_tokens`,
    `packed_size`): a bucket is captured here for full rows, and for every other number when it first comes.

    Args:
        session: opened by `open_session`, on CUDA with `cuda_graph`.
        manifest: of its bundle.
        gpu: number of the GPU, where it runs on CUDA; else None.
        buckets: the shapes; all of them are run once here, which captures them.
        tables: as for `PlainRunner`.
        worker: the thread; None: one of its own. Runners of one session of customers share it, since a capture fails
            where another thread works on the device.
    """

    def __init__(
        self,
        session: Any,
        manifest: Manifest,
        gpu: int | None,
        buckets: Buckets,
        tables: Tables | None = None,
        worker: Worker | None = None,
    ) -> None:
        self.buckets = buckets
        self._session, self._gpu, self._tables = session, gpu, tables
        self._names = text_inputs(manifest)
        self._answer, self._answer_name = manifest.outputs[0].shape, manifest.outputs[0].name
        self._layout, self._plain = layout_of(session, manifest), PlainRunner(session, self._names, tables)
        self._slots = any(value.name == SLOT for value in session.get_inputs())
        self._bound: dict[tuple[int, int, int], _Bound] = {}
        self._graphs = 0
        self._worker = worker or Worker()
        for batch, length in buckets:
            ones = {name: np.ones((batch, length), dtype=np.int64) for name in self._names}
            self.run(ones, np.zeros(batch, dtype=np.int64) if self._slots else None)

    def run(
        self, inputs: Inputs, slot: np.ndarray | None = None, before: Callable[[], None] | None = None
    ) -> np.ndarray:
        """As `Runner.run`; `before` is called first, while no graph runs."""

        def job() -> np.ndarray:
            if before is not None:
                before()
            return self._run(inputs, slot)

        logits: np.ndarray = self._worker.call(job)
        return logits

    def _run(self, inputs: Inputs, slot: np.ndarray | None) -> np.ndarray:
        batch, length = inputs[self._names[0]].shape
        fitting = self.buckets.fit(batch, length)
        if fitting is None:
            return self._plain.run(inputs, slot, self._options(NO_GRAPH))
        bound = self._find(
            (*fitting, self._layout.tokens(fitting, inputs)), None if self._tables is None else self._tables()
        )
        self._layout.write(bound.inputs, inputs)
        if slot is not None:
            bound.inputs[SLOT][:batch] = slot
            bound.inputs[SLOT][batch:] = 0
        bound.buffers.upload()
        with CAPTURES.of(self._gpu is not None, captures=not bound.captured):
            run_bound(self._session, bound.binding, bound.options)
        bound.captured = True
        bound.buffers.download()
        answer = bound.logits[:batch]
        return (answer if answer.ndim < 3 else answer[:, :length]).copy()

    def _find(self, shape: tuple[int, int, int], memory: Bindable | None) -> "_Bound":
        bound = self._bound.get(shape)
        if bound is None or bound.memory is not memory:
            # A table that has grown lies elsewhere, and a graph keeps its addresses: no bucket of
            # the old table is of use any more, and they are all that keeps it in memory.
            self._bound = {key: other for key, other in self._bound.items() if other.memory is memory}
            bound = self._bound[shape] = self._bind(shape, memory)
        return bound

    def _bind(self, shape: tuple[int, int, int], memory: Bindable | None) -> "_Bound":
        batch, length, tokens = shape
        shapes = self._layout.shapes((batch, length), tokens)
        if self._slots:
            shapes[SLOT] = (batch,)
        sizes = {"batch": batch, "sequence": length}
        answer = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self._answer)
        places, size_bytes = _places(shapes, answer)
        start = places[LOGITS].start
        buffers = _HostBuffers(size_bytes) if self._gpu is None else _CudaBuffers(size_bytes, start, self._gpu)
        binding = self._session.io_binding()
        arrays = {name: buffers.host[place].view(_dtype(name)) for name, place in places.items()}
        for name, its_shape in {**shapes, LOGITS: answer}.items():
            arrays[name] = arrays[name].reshape(its_shape)
            bind = binding.bind_output if name == LOGITS else binding.bind_input
            known, pointer = self._answer_name if name == LOGITS else name, buffers.pointer + places[name].start
            bind(known, buffers.device_type, self._gpu or 0, _dtype(name), its_shape, pointer)
        if memory is not None:
            memory.bind(binding)
        self._graphs += 1
        logits = arrays.pop(LOGITS)
        return _Bound(binding, self._options(str(self._graphs)), buffers, arrays, logits, memory)

    def _options(self, graph: str) -> Any:
        options = onnxruntime.RunOptions()
        if self._gpu is not None:
            options.add_run_config_entry("gpu_graph_id", graph)
        return options


@dataclass
class _Bound:
    """A bucket with its memory: what is written into `inputs`, and `logits` when it has run."""

    binding: Any
    options: Any
    buffers: "_HostBuffers | _CudaBuffers"
    inputs: dict[str, np.ndarray]
    logits: np.ndarray
    memory: Bindable | None
    captured: bool = False


class _HostBuffers:
    """Inputs and logits where they are: there is nothing to copy."""

    device_type = "cpu"

    def __init__(self, size_bytes: int) -> None:
        self._whole = np.zeros(size_bytes + ALIGNMENT, dtype=np.uint8)
        start = -self._whole.ctypes.data % ALIGNMENT
        self.host = self._whole[start : start + size_bytes]
        self.pointer = self.host.ctypes.data

    def upload(self) -> None:
        """Nothing to do."""

    def download(self) -> None:
        """Nothing to do."""


class _CudaBuffers:
    """Inputs and logits on the GPU, and pinned memory of the host from and to which they are copied whole."""

    device_type = "cuda"

    def __init__(self, size_bytes: int, inputs_bytes: int, device: int) -> None:
        self._buffer = CudaBuffer(size_bytes, device)
        self.host, self.pointer = pinned_bytes(size_bytes, device), self._buffer.pointer
        self._inputs_bytes, self._logits_bytes = inputs_bytes, size_bytes - inputs_bytes

    def upload(self) -> None:
        """All inputs in one copy."""
        self._buffer.copies.copy(self.pointer, self.host.ctypes.data, self._inputs_bytes, HOST_TO_DEVICE)

    def download(self) -> None:
        """The logits."""
        host, place = self.host.ctypes.data + self._inputs_bytes, self.pointer + self._inputs_bytes
        self._buffer.copies.copy(host, place, self._logits_bytes, DEVICE_TO_HOST)


def _places(inputs: Mapping[str, tuple[int, ...]], logits: tuple[int, ...]) -> tuple[dict[str, slice], int]:
    """Where each array lies in a buffer, the logits last, and the size of the buffer in bytes."""
    places, start = {}, 0
    for name, shape in {**inputs, LOGITS: logits}.items():
        size_bytes = int(np.prod(shape)) * _dtype(name).itemsize
        places[name] = slice(start, start + size_bytes)
        start += -(-size_bytes // ALIGNMENT) * ALIGNMENT
    return places, start


def _dtype(name: str) -> "np.dtype[Any]":
    return np.dtype(np.float32) if name == LOGITS else dtype_of(name)
