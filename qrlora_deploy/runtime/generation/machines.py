"""Where text is generated: how a decoder is run there, where its caches lie, and in which thread."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from qrlora_deploy.errors import InputError, NotReadyError, QrloraError, argument
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.generation.cache import CacheShape, KvCache
from qrlora_deploy.runtime.generation.cuda_cache import CudaKvCache
from qrlora_deploy.runtime.generation.cuda_graph import CudaDecoderGraph
from qrlora_deploy.runtime.generation.graph import DecoderGraph
from qrlora_deploy.runtime.generation.scheduler import Rows
from qrlora_deploy.runtime.generation.wishes import FILE, FILE_OF_ALL
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.host.forking import LOST_ON_GPU, survive_forks
from qrlora_deploy.runtime.sessions.session import open_session
from qrlora_deploy.runtime.sessions.worker import Worker

TUNING = "ep.cuda.enable_gemm_auto_tune"
"""Products with few rows, as branches are, have kernels of their own, of which ONNX Runtime finds the best one."""

GPU_CACHES = ("float16", "bfloat16")
"""dtypes of keys and values by which attention is computed on GPUs."""


class Machine(Protocol):
    """A processor or a GPU.

    Attributes:
        device: to open a session on.
        captured: whether runs are captured as CUDA graphs.
        block_tokens: of a prompt, as many as are read in one run with profit.
    """

    device: Device
    captured: bool
    block_tokens: int

    def graph(self, session: Any, rows: int, block_tokens: int) -> DecoderGraph:
        """The decoder of a session, for batches of so many rows and prompts in blocks of so many tokens at most."""

    def cache(self, shape: CacheShape, capacity: int) -> Rows:
        """Rows of so many tokens, none at first."""

    def call(self, work: Callable[[], None]) -> None:
        """Do something that runs the decoder."""


class Processor:
    """The host's own: whoever asks does the work."""

    captured, block_tokens = False, 128

    def __init__(self, device: Device) -> None:
        self.device = device

    def graph(self, session: Any, rows: int, block_tokens: int) -> DecoderGraph:
        """As `Machine.graph`."""
        return DecoderGraph(session)

    def cache(self, shape: CacheShape, capacity: int) -> Rows:
        """As `Machine.cache`."""
        return KvCache(shape, capacity)

    def call(self, work: Callable[[], None]) -> None:
        """As `Machine.call`."""
        work()


class Gpu:
    """A GPU: one thread does all the work, since ONNX Runtime keeps captured graphs by thread.

    Args:
        device: as it was asked for.
        captured: as `Machine.captured`.
    """

    # A run of few tokens takes as long as its launches.
    block_tokens = 512

    def __init__(self, device: Device, captured: bool) -> None:
        self.device, self.captured = replace(device, configure=partial(_configure, device.configure)), captured
        self._worker, self._lost = Worker(), False
        survive_forks(self)

    def before_fork(self) -> None:
        """Nothing to do."""

    def after_fork(self, in_child: bool) -> None:
        """CUDA does not live in a forked child."""
        self._lost = self._lost or in_child

    def graph(self, session: Any, rows: int, block_tokens: int) -> DecoderGraph:
        """As `Machine.graph`.

        Raises:
            QrloraError: the GPU has no room for a batch's logits.
        """
        try:
            return CudaDecoderGraph(session, self.device.index, rows, block_tokens, self.captured, self._open_drawing)
        except MemoryError as error:
            raise QrloraError(f"GPU {self.device.index} has no room for the logits of {rows} rows: {error}") from error

    def _open_drawing(self, vocabulary: int) -> tuple[Any, Any]:
        device = replace(self.device, configure=partial(_know, vocabulary))
        best, of_all = (open_session(file, device, cuda_graph=self.captured) for file in (FILE, FILE_OF_ALL))
        return best, of_all

    def cache(self, shape: CacheShape, capacity: int) -> Rows:
        """As `Machine.cache`."""
        return CudaKvCache(shape, capacity, self.device.index)

    def call(self, work: Callable[[], None]) -> None:
        """As `Machine.call`.

        Raises:
            NotReadyError: this is a forked child of the session's process.
        """
        if self._lost:
            raise NotReadyError(LOST_ON_GPU)
        self._worker.call(work)


def _configure(further: Callable[[Any], None] | None, options: Any) -> None:
    options.add_session_config_entry(TUNING, "1")
    if further is not None:
        further(options)


def _know(vocabulary: int, options: Any) -> None:
    """What follows from the vocabulary alone is computed once, or runs could not be captured."""
    options.add_free_dimension_override_by_name("vocabulary", vocabulary)


def machine_of(device: Device, bundle: Bundle, captured: bool) -> Machine:
    """Where a bundle is to run.

    Raises:
        InputError: it cannot run there.
    """
    if not device.on_gpu:
        return Processor(device)
    if device.provider != "cuda":
        raise InputError(f"text is generated on CPUs and by CUDA; pass {argument('provider', 'cuda')}")
    dtypes = {record.dtype for record in bundle.manifest.inputs if record.name.startswith("past_key_values.")}
    if not dtypes <= set(GPU_CACHES):
        raise InputError(
            f"{bundle.folder} keeps keys and values in {', '.join(sorted(dtypes))}, and GPUs compute attention in fp16 "
            f"and bf16 alone; export it with {argument('precision', 'fp16')}, or pass {argument('provider', 'cpu')}"
        )
    return Gpu(device, captured)
