"""Small arrays that go to a GPU and come from it together."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qrlora_deploy.runtime.table.cuda import DEVICE_TO_HOST, CudaBuffer, pinned_bytes

ALIGNMENT = 256
"""Of every array, in bytes: what CUDA's own allocations have."""


class CudaArrays:
    """Arrays in one piece of a GPU's memory, and pinned memory of the host for each.

    They lie where they are from the first run to the last: captured graphs keep addresses.

    Args:
        kinds: by name, in the order in which they lie: dtype and length.
        device: number of the GPU.

    Attributes:
        host: by name, the host's memory.
        addresses: by name, where that is.
        pointers: by name, where it is on the GPU.
        copies: to and from there.

    Raises:
        MemoryError: the GPU has no room.
    """

    def __init__(self, kinds: Mapping[str, tuple[Any, int]], device: int) -> None:
        starts, size_bytes = {}, 0
        for name, (dtype, length) in kinds.items():
            starts[name] = size_bytes
            size_bytes += -(-length * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        self._buffer = CudaBuffer(size_bytes, device)
        whole = pinned_bytes(size_bytes, device)
        self.copies = self._buffer.copies
        self.host = {name: whole[start:].view(kinds[name][0])[: kinds[name][1]] for name, start in starts.items()}
        self.pointers = {name: self._buffer.pointer + start for name, start in starts.items()}
        # Asked for once: numpy takes longer to tell an address than to copy.
        self.addresses = {name: array.ctypes.data for name, array in self.host.items()}

    def upload(self, names: Sequence[str]) -> None:
        """Bring the arrays from the first one of these to the last one to the GPU, in one copy."""
        first, last = names[0], names[-1]
        size_bytes = self.pointers[last] + self.host[last].nbytes - self.pointers[first]
        self.copies.begin_copy(self.pointers[first], self.addresses[first], size_bytes)
        self.copies.wait()

    def begin_download(self, name: str, length: int) -> None:
        """Begin to bring the beginning of an array from the GPU; `copies` waits for it."""
        size_bytes = length * self.host[name].itemsize
        self.copies.begin_copy(self.addresses[name], self.pointers[name], size_bytes, DEVICE_TO_HOST)
