"""Where merged weights lie: arrays of the host, or one buffer of a GPU."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime

from qrlora_deploy.runtime.table.cuda import DEVICE_TO_DEVICE, CudaBuffer

ALIGNMENT = 256
"""Of every weight in a buffer, in bytes: what CUDA's own allocations have."""


class Weights(Protocol):
    """The weights of the targets, with one customer in them, under the names of a graph's inputs."""

    def bind(self, binding: Any) -> None:
        """Give them to an `onnxruntime.IOBinding` as inputs."""

    def bind_outputs(self, binding: Any) -> None:
        """Have a run write them."""

    def copy(self, other: Any) -> None:
        """Take the numbers of others of the same shapes."""


class HostWeights:
    """Arrays of the host.

    Args:
        shapes: of the weights, by name.
        dtype: of all of them.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: "np.dtype[Any]") -> None:
        self.arrays = {name: np.zeros(shape, dtype) for name, shape in shapes.items()}
        self._values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()}

    def bind(self, binding: Any) -> None:
        """As `Weights.bind`."""
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)

    def bind_outputs(self, binding: Any) -> None:
        """As `Weights.bind_outputs`."""
        for name, value in self._values.items():
            binding.bind_ortvalue_output(name, value)

    def copy(self, other: Any) -> None:
        """As `Weights.copy`."""
        for name, array in self.arrays.items():
            array[:] = other.arrays[name]


class CudaWeights:
    """One buffer of a GPU; arguments as of `HostWeights`.

    Args:
        device: number of the GPU.

    Raises:
        MemoryError: it does not fit.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: "np.dtype[Any]", device: int) -> None:
        self._shapes, self._device = shapes, device
        self._dtype = dtype
        self._starts, self._size_bytes = {}, 0
        for name, shape in shapes.items():
            self._starts[name] = self._size_bytes
            self._size_bytes += -(-int(np.prod(shape)) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._buffer = CudaBuffer(self._size_bytes, device)

    def bind(self, binding: Any) -> None:
        """As `Weights.bind`."""
        self._bind(binding.bind_input)

    def bind_outputs(self, binding: Any) -> None:
        """As `Weights.bind_outputs`."""
        self._bind(binding.bind_output)

    def _bind(self, bind: Any) -> None:
        for name, shape in self._shapes.items():
            bind(name, "cuda", self._device, self._dtype.type, shape, self._buffer.pointer + self._starts[name])

    def copy(self, other: Any) -> None:
        """As `Weights.copy`."""
        self._buffer.copies.copy(self._buffer.pointer, other._buffer.pointer, self._size_bytes, DEVICE_TO_DEVICE)
