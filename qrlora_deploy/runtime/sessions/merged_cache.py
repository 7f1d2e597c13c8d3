"""Merged weights of customers who have batches for themselves: such a batch costs what a merged graph's does.

A session of many customers takes some per cent longer than one of a single customer. Where all rows of a batch are of
one customer, and were before, his weights are made on the device, in a fraction of a run, and kept. They are of one
version: whoever asks names it, and another one is never given.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.bundle.row_layout import HEAD_TABLE, SLOT, TABLE
from qrlora_deploy.runtime.host.captures import CAPTURES
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.bucket_runner import BucketRunner
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.merged_weights import CudaWeights, HostWeights, Weights
from qrlora_deploy.runtime.sessions.packed_tokens import is_packed
from qrlora_deploy.runtime.sessions.running import Inputs, PlainRunner, is_on_gpu, run_bound, text_inputs
from qrlora_deploy.runtime.sessions.shared import shared_session
from qrlora_deploy.runtime.sessions.token_index import is_plain_text
from qrlora_deploy.runtime.sessions.worker import Worker
from qrlora_deploy.runtime.table.memory import TableMemory

_log = logging.getLogger(__name__)

BATCHES = 2
"""Batches of one version before its weights are merged: a merge costs more than one batch saves."""

REMEMBERED = 4096
"""Customers whose batches are counted."""


def captures(device: Device) -> bool:
    """Whether runs in buckets are captured, with the addresses of the weights that they read."""
    return device.provider == "cuda"


@dataclass(frozen=True)
class _Kept:
    digest: str
    weights: Weights


class _Bindable:
    """The merged weights, and the table of heads where there is one, as a runner binds them.

    Args:
        memory: of the table, where rows have heads.
    """

    def __init__(self, weights: Weights, memory: TableMemory | None) -> None:
        self.weights, self.memory = weights, memory

    def bind(self, binding: Any) -> None:
        """As `TableMemory.bind`."""
        self.weights.bind(binding)
        if self.memory is not None:
            self.memory.parts[HEAD_TABLE].bind(binding, HEAD_TABLE)


class MergedCache:
    """Answers batches of one customer with merged weights. Safe for many threads.

    Args:
        bundle: with the graphs for one customer.
        provider: as of the session.
        size_bytes: of all merged weights that are kept; what was not asked for longest gives way.
        tables: of the session, as they lie now.
        threads: within an operator.
        buckets: of the session; on CUDA there is one more set of weights then, which captured graphs read.
        worker: the thread of the session's runs in buckets, which does merges, too.

    Attributes:
        merges: how many were made.
        hits: batches that were answered.

    Raises:
        InputError: the bundle lacks the graphs, or not one customer fits.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str | Device,
        size_bytes: int,
        tables: Callable[[], TableMemory],
        threads: int | None = None,
        buckets: Buckets | None = None,
        worker: Worker | None = None,
    ) -> None:
        if bundle.alone is None:
            raise InputError(
                f"{bundle.folder} has no graphs for one customer; export it with {argument('merged_cache')}, or open "
                "it without merged weights"
            )
        if type(size_bytes) is not int or size_bytes < 0:
            raise InputError(f"merged_cache_bytes must be a whole number of at least 0, not {size_bytes!r:.40}")
        device = Device.of(provider)
        merge, alone = bundle.alone
        captured = buckets is not None and captures(device)
        self._merging = shared_session(bundle, merge, provider, threads)
        self._session = shared_session(bundle, alone, provider, threads, captured)
        self._tables, self._texts, self._pad = tables, text_inputs(bundle.manifest), bundle.manifest.pad_token_id
        self._heads = any(value.name == SLOT for value in self._session.get_inputs())
        self._packed = is_packed(self._session)
        self._shapes = {value.name: tuple(value.shape) for value in self._merging.get_outputs()}
        dtype = np.dtype(_DTYPES[self._merging.get_outputs()[0].type])
        self._make: Callable[[], Weights] = lambda: (
            CudaWeights(self._shapes, dtype, device.index) if device.on_gpu else HostWeights(self._shapes, dtype)
        )
        self._each_bytes = sum(int(np.prod(shape)) for shape in self._shapes.values()) * dtype.itemsize
        self._most = size_bytes // self._each_bytes
        if not self._most:
            raise InputError(
                f"{size_bytes} bytes of merged weights hold no customer: those of one are {self._each_bytes} bytes"
            )
        self._kept: OrderedDict[str | None, _Kept] = OrderedDict()
        self._seen: OrderedDict[tuple[str | None, str], int] = OrderedDict()
        self._lock, self._one_merge = threading.Lock(), threading.Lock()
        self.merges = self.hits = self._discards = 0
        self._worker = worker if captured else None
        self._captured: BucketRunner | None = None
        self._current: Weights | None = None
        if captured and buckets is not None:
            gpu = device.index if device.provider == "cuda" else None
            self._shared = self._make()
            self._bindable = _Bindable(self._shared, self._heads_memory())
            self._captured = BucketRunner(self._session, bundle.manifest, gpu, buckets, self._fixed, worker)

    @property
    def size_bytes(self) -> int:
        """Of the merged weights that are kept."""
        return len(self._kept) * self._each_bytes

    def run(self, inputs: Inputs, customer: str | None, digest: str, row: int) -> np.ndarray | None:
        """The logits of a batch that is one customer's; None where the session is to answer it as any other.

        Args:
            digest: of the version that is in `row`, which is held meanwhile.
        """
        if self._packed and not is_plain_text(inputs, self._pad):
            return None
        kept = self._find(customer, digest, row)
        if kept is None:
            return None
        slot = np.full(len(inputs["attention_mask"]), row, dtype=np.int64) if self._heads else None
        with self._lock:
            self.hits += 1
        if self._captured is not None:
            return self._captured.run(inputs, slot, lambda: self._put(kept.weights))
        bindable = _Bindable(kept.weights, self._heads_memory())
        return PlainRunner(self._session, self._texts, lambda: bindable).run(inputs, slot)

    def discard(self, customer: str | None) -> None:
        """Give back what is kept of a customer, whatever the version."""
        with self._lock:
            self._kept.pop(customer, None)
            self._discards += 1

    def _find(self, customer: str | None, digest: str, row: int) -> _Kept | None:
        with self._lock:
            kept = self._known(customer, digest)
            if kept is not None or not self._counted(customer, digest):
                return kept
            discards = self._discards
        with self._one_merge:
            with self._lock:
                kept = self._known(customer, digest)
            if kept is not None:
                return kept
            try:
                weights = self._merged(row) if self._worker is None else self._worker.call(lambda: self._merged(row))
            except MemoryError as error:
                # The session can answer without.
                _log.warning("no room for merged weights: %s", error)
                return None
            with self._lock:
                self.merges += 1
                kept = _Kept(digest, weights)
                # A customer who went meanwhile leaves nothing behind; this batch still has him.
                if self._discards == discards:
                    self._keep(customer, kept)
        return kept

    def _known(self, customer: str | None, digest: str) -> _Kept | None:
        """What is kept of this version. Called with the lock."""
        kept = self._kept.get(customer)
        if kept is None or kept.digest != digest:
            return None
        self._kept.move_to_end(customer)
        return kept

    def _keep(self, customer: str | None, kept: _Kept) -> None:
        """Keep it; what was not asked for longest gives way. Called with the lock."""
        self._kept[customer] = kept
        self._kept.move_to_end(customer)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _counted(self, customer: str | None, digest: str) -> bool:
        """Whether this version has had batches enough. Called with the lock."""
        count = self._seen.pop((customer, digest), 0) + 1
        if count >= BATCHES:
            return True
        self._seen[customer, digest] = count
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return False

    def _merged(self, row: int) -> Weights:
        weights, memory = self._make(), self._tables()
        with CAPTURES.of(is_on_gpu(self._merging)):
            binding = self._merging.io_binding()
            memory.parts[TABLE].bind(binding, TABLE)
            binding.bind_cpu_input(SLOT, np.array([row], dtype=np.int64))
            weights.bind_outputs(binding)
            run_bound(self._merging, binding)
        return weights

    def _put(self, weights: Weights) -> None:
        """Let captured graphs read these weights; called where no graph runs."""
        if self._current is not weights:
            # Whatever happens on the way, what lies there is nobody's.
            self._current = None
            self._shared.copy(weights)
            self._current = weights

    def _heads_memory(self) -> TableMemory | None:
        return self._tables() if self._heads else None

    def _fixed(self) -> _Bindable:
        """What captured graphs are bound to: another object once the table of heads has grown."""
        memory = self._heads_memory()
        if self._bindable.memory is not memory:
            self._bindable = _Bindable(self._shared, memory)
        return self._bindable


_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
"""Of merged weights, by ONNX Runtime's names."""
