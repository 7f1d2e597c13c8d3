"""The CUDA runtime library, as far as the table and the buckets need it: buffers, copies, streams.

Through ctypes: ONNX Runtime's Python package has no copy into a part of a buffer, and a serving host
has no other CUDA package.
"""

import ctypes
import functools
import sys
import weakref
from typing import Any

import numpy as np

from qrlora_deploy.errors import ProviderError, QrloraError

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
"""`cudaMemcpyKind`."""

NON_BLOCKING = 1
"""`cudaStreamNonBlocking`: copies on such a stream wait for nothing that runs on others."""


@functools.cache
def cuda_runtime() -> Any:
    """The library, which ONNX Runtime's CUDA provider has loaded already.

    Raises:
        ProviderError: it is not there.
    """
    pattern = "cudart64_{}.dll" if sys.platform == "win32" else "libcudart.so.{}"
    for version in (13, 12):
        try:
            return ctypes.CDLL(pattern.format(version))
        except OSError:
            continue
    raise ProviderError("the CUDA runtime library was not found; pip install 'qrlora-deploy[cuda]' brings it")


class CudaBuffer:
    """Zeroed memory of a GPU; given back when nobody refers to it any more.

    Args:
        size_bytes: how much.
        device: number of the GPU.

    Attributes:
        pointer: the address.

    Raises:
        MemoryError: it does not fit. ProviderError: CUDA is not there.
    """

    def __init__(self, size_bytes: int, device: int = 0) -> None:
        cuda, place = cuda_runtime(), ctypes.c_void_p()
        _check(cuda.cudaSetDevice(device))
        if cuda.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(size_bytes)):
            cuda.cudaGetLastError()  # or the next call reports it again
            raise MemoryError(f"{size_bytes} bytes do not fit GPU {device}")
        _when_gone(self, cuda.cudaFree, place)
        self.pointer = int(place.value or 0)
        self.device = device
        _check(cuda.cudaMemset(place, 0, ctypes.c_size_t(size_bytes)))
        _check(cuda.cudaDeviceSynchronize())


class CudaCopies:
    """Copies on a stream of their own, each done when the call returns. For one thread at a time.

    A copy from ordinary memory may still be under way when CUDA says that it is done; so all of
    them go through pinned memory, or wait for their stream.

    Raises:
        ProviderError: CUDA is not there.
    """

    def __init__(self, device: int = 0) -> None:
        self._cuda, self._device, self._stream = cuda_runtime(), device, ctypes.c_void_p()
        _check(self._cuda.cudaSetDevice(device))
        _check(self._cuda.cudaStreamCreateWithFlags(ctypes.byref(self._stream), NON_BLOCKING))
        _when_gone(self, self._cuda.cudaStreamDestroy, self._stream)

    def copy(self, target: int, source: int, size_bytes: int, kind: int) -> None:
        """Copy `size_bytes` from one address to another and wait until they are there."""
        _check(self._cuda.cudaSetDevice(self._device))
        place, origin, size = ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size_bytes)
        _check(self._cuda.cudaMemcpyAsync(place, origin, size, kind, self._stream))
        _check(self._cuda.cudaStreamSynchronize(self._stream))


def pinned_bytes(size_bytes: int) -> np.ndarray:
    """Host memory `[size_bytes]` uint8, zero, that a GPU copies from and to directly.

    Raises:
        QrloraError: there is not so much of it.
    """
    cuda, place = cuda_runtime(), ctypes.c_void_p()
    _check(cuda.cudaHostAlloc(ctypes.byref(place), ctypes.c_size_t(size_bytes), 0))
    block = (ctypes.c_uint8 * size_bytes).from_address(int(place.value or 0))
    # numpy holds on to the block, and with it the memory.
    _when_gone(block, cuda.cudaFreeHost, place)
    array = np.ctypeslib.as_array(block)
    array[:] = 0
    return array


def _when_gone(owner: object, release: Any, what: ctypes.c_void_p) -> None:
    # Not at the end of the process, when CUDA may have gone before.
    weakref.finalize(owner, release, what).atexit = False


def _check(code: int) -> None:
    if code:
        raise QrloraError(f"CUDA refused to copy or to give memory (error {code})")
