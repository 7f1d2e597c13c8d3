"""The graph and the runner of a bundle on a device."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.bundle.bundle import Bundle, check_graph
from qrlora_deploy.runtime.bundle.packed_inputs import PACKED_PRECISION
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.bucket_runner import BucketRunner
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.running import Inputs, PlainRunner, Runner, Tables, text_inputs
from qrlora_deploy.runtime.sessions.shared import shared_session
from qrlora_deploy.runtime.sessions.token_index import is_plain_text
from qrlora_deploy.runtime.sessions.worker import Worker


def open_graph(
    bundle: Bundle, provider: str | Device = "cpu", threads: int | None = None, cuda_graph: bool = False
) -> Any:
    """The session of a bundle's graph for a device; on CUDA that of packed attention, where the bundle has one.

    Returns:
        An `onnxruntime.InferenceSession`, as of `shared_session`.

    Raises:
        ProviderError: as of `open_session`.
        InputError: so many threads cannot be started.
        FileFormatError: ONNX Runtime refuses the graph, or it has other inputs or outputs than the
            manifest says.
    """
    packed = _packed(bundle, provider)
    session = shared_session(bundle, packed or bundle.model, provider, threads, cuda_graph)
    check_graph(session, bundle)
    return session


def make_runner(
    session: Any,
    bundle: Bundle,
    provider: str | Device,
    buckets: Buckets | None,
    tables: Tables | None = None,
    threads: int | None = None,
    worker: Worker | None = None,
) -> Runner:
    """A `BucketRunner` where there are buckets, else a `PlainRunner`.

    Args:
        session: opened by `open_graph` for `provider`. Where its attention is packed, batches that it cannot take
            run in the bundle's other graph, which is opened for the first of them.
        tables: of a switchable bundle.
        threads: of the other graph, as for `open_graph`.
        worker: the thread of all runs where there are buckets; None: one of its own.

    Raises:
        InputError: a bucket is longer than the model can take.
    """
    manifest = bundle.manifest
    if buckets is None:
        runner: Runner = PlainRunner(session, text_inputs(manifest), tables)
    elif buckets.lengths[-1] > manifest.max_length:
        raise InputError(f"a bucket of {buckets.lengths[-1]} tokens is longer than the model's {manifest.max_length}")
    else:
        device = Device.of(provider)
        gpu = device.index if device.provider == "cuda" else None
        worker = worker or Worker()
        runner = BucketRunner(session, manifest, gpu, buckets, tables, worker)
    if _packed(bundle, provider) is None:
        return runner

    def make_other() -> Runner:
        other = shared_session(bundle, bundle.model, provider, threads)
        check_graph(other, bundle)
        return PlainRunner(other, text_inputs(manifest), tables)

    def open_other() -> Runner:
        return make_other() if worker is None else WorkerRunner(worker.call(make_other), worker)

    return PaddingRunner(runner, open_other, manifest.pad_token_id)


class WorkerRunner:
    """Runs batches in the thread of another runner, so that none of its graphs is captured meanwhile.

    While CUDA captures a graph, whatever another thread allocates or waits for on the device ends the capture.
    """

    def __init__(self, runner: Runner, worker: Worker) -> None:
        self._runner, self._worker = runner, worker

    def run(self, inputs: Inputs, slot: np.ndarray | None = None) -> np.ndarray:
        """As `Runner.run`."""
        logits: np.ndarray = self._worker.call(lambda: self._runner.run(inputs, slot))
        return logits


class PaddingRunner:
    """Runs right-padded batches in one graph, and all others in another one.

    Args:
        right: for batches of plain text, as `is_plain_text` has it.
        open_other: makes the runner for the others. It is called once, by the first such batch: most users never
            send one, and its session holds all weights again.
        pad: number of the token of padding.
    """

    def __init__(self, right: Runner, open_other: Callable[[], Runner], pad: int) -> None:
        self._right, self._open_other, self._pad = right, open_other, pad
        self._other: Runner | None = None
        self._opening = threading.Lock()

    def run(self, inputs: Inputs, slot: np.ndarray | None = None) -> np.ndarray:
        """As `Runner.run`."""
        runner = self._right if is_plain_text(inputs, self._pad) else self._find_other()
        return runner.run(inputs, slot)

    def _find_other(self) -> Runner:
        with self._opening:
            if self._other is None:
                self._other = self._open_other()
            return self._other


def _packed(bundle: Bundle, provider: str | Device) -> Any:
    """The graph of packed attention, where the bundle has one and the device is made for it.

    Earlier exports wrote one in fp32 too, where a row whose numbers overflow may spoil another one.
    """
    fits = Device.of(provider).provider == "cuda" and bundle.manifest.precision == PACKED_PRECISION
    return bundle.packed if fits else None
