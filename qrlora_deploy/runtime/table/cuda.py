"""The CUDA runtime library, as far as the table and the buckets need it: buffers, copies, streams.

Through ctypes: ONNX Runtime's Python package has no copy into a part of a buffer, and a serving host
has no other CUDA package.
"""

import ctypes
import functools
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrlora_deploy.errors import ProviderError, QrloraError

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
"""`cudaMemcpyKind`."""

RELAXED = 2
"""`cudaStreamCaptureModeRelaxed`."""

NON_BLOCKING = 1
"""`cudaStreamNonBlocking`: copies on such a stream wait for nothing that runs on others."""

NOT_READY = 600
"""`cudaErrorNotReady`, which is no error."""

QUERIES = 64
"""How often a small copy is asked whether it is done, about a microsecond each, before it is waited for."""

POINTER, SIZE = ctypes.c_void_p, ctypes.c_size_t
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cudaMemcpyAsync": (POINTER, POINTER, SIZE, ctypes.c_int, POINTER),
    "cudaMemcpy2DAsync": (POINTER, SIZE, POINTER, SIZE, SIZE, SIZE, ctypes.c_int, POINTER),
    "cudaMemsetAsync": (POINTER, ctypes.c_int, SIZE, POINTER),
    "cudaStreamSynchronize": (POINTER,),
    "cudaStreamQuery": (POINTER,),
    "cudaStreamDestroy": (POINTER,),
    "cudaFree": (POINTER,),
    "cudaFreeHost": (POINTER,),
}
"""Types of the functions that take plain numbers for addresses."""


@functools.cache
def cuda_runtime() -> Any:
    """The library, which ONNX Runtime's CUDA provider has loaded already.

    Raises:
        ProviderError: it is not there.
    """
    return _load(ctypes.CDLL)


@functools.cache
def held_cuda_runtime() -> Any:
    """The same, but its functions keep the interpreter's lock: for calls that never wait.

    Giving the lock up and getting it back costs more than such a call, and much more where another
    thread takes it meanwhile.

    Raises:
        ProviderError: it is not there.
    """
    return _load(ctypes.PyDLL)


def _load(kind: Any) -> Any:
    pattern = "cudart64_{}.dll" if sys.platform == "win32" else "libcudart.so.{}"
    for version in (13, 12):
        try:
            library = kind(pattern.format(version))
        except OSError:
            continue
        for name, types in ARGUMENTS.items():
            getattr(library, name).argtypes = types
        return library
    raise ProviderError("the CUDA runtime library was not found; pip install 'qrlora-deploy[cuda]' brings it")


class CudaCopies:
    """Copies on a stream of their own. For one thread at a time but where it is said.

    Raises:
        ProviderError: CUDA is not there.
    """

    def __init__(self, device: int = 0) -> None:
        self._cuda, self._device, self._stream = cuda_runtime(), device, ctypes.c_void_p()
        held, self._mode = held_cuda_runtime(), ctypes.c_int(RELAXED)
        self._mode_place = ctypes.byref(self._mode)
        # Looked up once: a small copy takes about as long as to find and call them.
        self._exchange, self._last_error = held.cudaThreadExchangeStreamCaptureMode, held.cudaGetLastError
        self._begin, self._query = held.cudaMemcpyAsync, held.cudaStreamQuery
        self._begin_pieces = held.cudaMemcpy2DAsync
        with _BesideCaptures():
            _check(self._cuda.cudaSetDevice(device))
            _check(self._cuda.cudaStreamCreateWithFlags(ctypes.byref(self._stream), NON_BLOCKING))
        _when_gone(self, self._cuda.cudaStreamDestroy, self._stream)

    def copy(self, target: int, source: int, size_bytes: int, kind: int) -> None:
        """Copy `size_bytes` from one address to another and wait until they are there."""
        place, origin, size = ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size_bytes)
        with _BesideCaptures():
            _check(self._cuda.cudaSetDevice(self._device))
            _check(self._cuda.cudaMemcpyAsync(place, origin, size, kind, self._stream))
            # Also where the host's memory is not pinned: CUDA may say that such a copy is done while
            # it is under way.
            _check(self._cuda.cudaStreamSynchronize(self._stream))

    def begin_copy(self, target: int, source: int, size_bytes: int, kind: int = HOST_TO_DEVICE) -> None:
        """Begin to copy a few kilobytes between pinned memory of the host and the device; `wait` waits for it.

        The calls keep the interpreter's lock, as none of them waits. The thread's current device does
        not matter: a copy follows its stream.
        """
        # As `_BesideCaptures` does, whose calls in Python would cost as much as this.
        self._mode.value = RELAXED
        self._exchange(self._mode_place)
        code = self._begin(target, source, size_bytes, kind, self._stream)
        self._exchange(self._mode_place)
        if code:
            _check(code)

    def begin_pieces(self, target: "Pieces", source: "Pieces", size_bytes: int, count: int, kind: int) -> None:
        """Begin to copy `count` pieces of `size_bytes` each; as `begin_copy`."""
        self._mode.value = RELAXED
        self._exchange(self._mode_place)
        places = (target.pointer, target.distance, source.pointer, source.distance)
        code = self._begin_pieces(*places, size_bytes, count, kind, self._stream)
        self._exchange(self._mode_place)
        if code:
            _check(code)

    def wait(self) -> None:
        """Wait until everything that was begun is there. For any number of threads."""
        mode = ctypes.c_int(RELAXED)
        place, query, left = ctypes.byref(mode), self._query, QUERIES
        self._exchange(place)
        while (code := query(self._stream)) == NOT_READY and (left := left - 1):
            pass
        if code == NOT_READY:
            # Other threads go on, as this may take longer.
            code = self._cuda.cudaStreamSynchronize(self._stream)
        # "Not ready" stays the thread's last error, which ONNX Runtime would take for its own.
        self._last_error()
        self._exchange(place)
        _check(code)

    def clear(self, target: int, size_bytes: int) -> None:
        """Set `size_bytes` to zero and wait."""
        with _BesideCaptures():
            _check(self._cuda.cudaSetDevice(self._device))
            _check(self._cuda.cudaMemsetAsync(ctypes.c_void_p(target), 0, ctypes.c_size_t(size_bytes), self._stream))
            _check(self._cuda.cudaStreamSynchronize(self._stream))


@dataclass(frozen=True)
class Pieces:
    """Where pieces of memory of one size lie.

    Attributes:
        pointer: the address of the first one.
        distance: bytes from one to the next, of their beginnings.
    """

    pointer: int
    distance: int


class CudaBuffer:
    """Zeroed memory of a GPU; given back when nobody refers to it any more.

    Args:
        size_bytes: how much.
        device: number of the GPU.
        copies: on that GPU, to share them with other buffers; None: of its own.

    Attributes:
        pointer: the address.
        copies: for what is copied there.

    Raises:
        MemoryError: it does not fit.
        ProviderError: CUDA is not there.
    """

    def __init__(self, size_bytes: int, device: int = 0, copies: CudaCopies | None = None) -> None:
        cuda, place = cuda_runtime(), ctypes.c_void_p()
        self.copies = copies or CudaCopies(device)
        with _BesideCaptures():
            _check(cuda.cudaSetDevice(device))
            if cuda.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(size_bytes)):
                cuda.cudaGetLastError()  # or the next call reports it again
                raise MemoryError(f"{size_bytes} bytes do not fit GPU {device}")
        _when_gone(self, cuda.cudaFree, place)
        self.pointer = int(place.value or 0)
        self.copies.clear(self.pointer, size_bytes)


def device_count() -> int:
    """How many GPUs there are; 0 also where there is no driver.

    Raises:
        ProviderError: CUDA is not there.
    """
    cuda, count = cuda_runtime(), ctypes.c_int()
    if cuda.cudaGetDeviceCount(ctypes.byref(count)):
        cuda.cudaGetLastError()  # or the next call reports it again
        return 0
    return count.value


def pinned_bytes(size_bytes: int, device: int = 0) -> np.ndarray:
    """Host memory `[size_bytes]` uint8, zero, that a GPU copies from and to directly.

    Raises:
        QrloraError: there is not so much of it.
    """
    cuda, place = cuda_runtime(), ctypes.c_void_p()
    with _BesideCaptures():
        _check(cuda.cudaSetDevice(device))
        _check(cuda.cudaHostAlloc(ctypes.byref(place), ctypes.c_size_t(size_bytes), 0))
    block = (ctypes.c_uint8 * size_bytes).from_address(int(place.value or 0))
    # numpy holds on to the block, and with it the memory.
    _when_gone(block, cuda.cudaFreeHost, place)
    array = np.ctypeslib.as_array(block)
    array[:] = 0
    return array


def free_bytes() -> int:
    """Memory of the current GPU that nobody uses.

    Raises:
        ProviderError: CUDA is not there.
        QrloraError: it does not tell.
    """
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with _BesideCaptures():
        _check(cuda_runtime().cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
    return free.value


class _BesideCaptures:
    """Calls in here are allowed while another thread captures a graph, and do not spoil its capture.

    ONNX Runtime captures in the mode in which CUDA refuses others' allocations. None of ours ends
    in a captured graph.
    """

    def __enter__(self) -> None:
        self._mode = ctypes.c_int(RELAXED)
        self._exchange()

    def __exit__(self, *_: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        """Set the thread's mode; the one it had takes its place here."""
        cuda_runtime().cudaThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))


def _when_gone(owner: object, release: Any, what: ctypes.c_void_p) -> None:
    # Not at the end of the process, when CUDA may have gone before.
    weakref.finalize(owner, _release, release, what).atexit = False


def _release(release: Any, what: ctypes.c_void_p) -> None:
    with _BesideCaptures():
        release(what)


def _check(code: int) -> None:
    if code:
        raise QrloraError(f"CUDA refused to copy or to give memory (error {code})")
