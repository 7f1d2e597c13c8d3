"""Where the rows of a coefficient table lie: an array of the host, or one buffer of a GPU."""

from typing import Any, Protocol

import numpy as np
import onnxruntime

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.cuda import DEVICE_TO_DEVICE, HOST_TO_DEVICE, CudaBuffer, pinned_bytes


class Memory(Protocol):
    """Rows of fp32 that ONNX Runtime reads while single rows are written.

    A row that no run reads may be written at any time; which rows these are is the table's affair.
    """

    rows: int
    width: int

    def write(self, row: int, values: np.ndarray) -> None:
        """Copy `values [width]` fp32 into a row; done when it returns."""

    def write_rows(self, start: int, values: np.ndarray) -> None:
        """Copy `values [n, width]` fp32 into the rows from `start` on, in one go."""

    def grown(self, rows: int) -> "Memory":
        """A new memory with more rows, the first ones being copies of these."""

    def bind(self, binding: Any, name: str) -> None:
        """Give the whole memory to an `onnxruntime.IOBinding` as the input `name`, without a copy."""


class TableMemory:
    """The inputs of a graph that have a row per customer, written together.

    Args:
        parts: a memory for each input, all with the same number of rows.
    """

    def __init__(self, parts: dict[str, Memory]) -> None:
        self.parts = parts
        self.rows = next(iter(parts.values())).rows

    def write(self, row: int, values: dict[str, np.ndarray]) -> None:
        """Copy `values`, a row `[width]` fp32 for every input, and wait until they are there."""
        for name, part in self.parts.items():
            part.write(row, values[name])

    def write_rows(self, start: int, values: dict[str, np.ndarray]) -> None:
        """Copy `values`, rows `[n, width]` fp32 for every input, to the rows from `start` on, and wait."""
        for name, part in self.parts.items():
            part.write_rows(start, values[name])

    def grown(self, rows: int) -> "TableMemory":
        """A larger copy."""
        return TableMemory({name: part.grown(rows) for name, part in self.parts.items()})

    def bind(self, binding: Any) -> None:
        """Bind every part to the input of its name."""
        for name, part in self.parts.items():
            part.bind(binding, name)


def make_memory(widths: dict[str, int], rows: int, provider: str) -> TableMemory:
    """Zeroed memory for inputs of these `widths`, on the device of an execution provider.

    Raises:
        QrloraError: it does not fit. ProviderError: CUDA is not there.
    """
    kind = HostMemory if provider == "cpu" else CudaMemory
    return TableMemory({name: kind(rows, width) for name, width in widths.items()})


class HostMemory:
    """Rows in one numpy array `[rows, width]`, zero at the start."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        try:
            self.array = np.zeros((rows, width), dtype=np.float32)
        except MemoryError as error:
            raise QrloraError(_too_large(rows, width, "the host")) from error
        # Made once and kept with its array: it only points to the array's memory.
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy(self.array)

    def write(self, row: int, values: np.ndarray) -> None:
        """Copy `values [width]` into a row."""
        self.array[row] = values

    def write_rows(self, start: int, values: np.ndarray) -> None:
        """Copy `values [n, width]` into the rows from `start` on."""
        _check_block(values, start, self)
        self.array[start : start + len(values)] = values

    def grown(self, rows: int) -> "HostMemory":
        """A larger copy."""
        larger = HostMemory(rows, self.width)
        larger.array[: self.rows] = self.array
        return larger

    def bind(self, binding: Any, name: str) -> None:
        """Bind the array itself."""
        binding.bind_ortvalue_input(name, self.value)


class CudaMemory:
    """Rows in one buffer of a GPU, zero at the start. A row is copied there on its own."""

    def __init__(self, rows: int, width: int, device: int = 0) -> None:
        self.rows, self.width, self.device = rows, width, device
        try:
            self.buffer = CudaBuffer(4 * rows * width, device)
        except MemoryError as error:
            raise QrloraError(_too_large(rows, width, f"GPU {device}")) from error
        self._row = pinned_bytes(4 * width).view(np.float32)

    def write(self, row: int, values: np.ndarray) -> None:
        """Copy `values [width]` into a row and wait until they are there."""
        self._row[:] = values
        self._copy(row, self._row.ctypes.data, self._row.nbytes, HOST_TO_DEVICE)

    def write_rows(self, start: int, values: np.ndarray) -> None:
        """Copy `values [n, width]` into the rows from `start` on, with one copy, and wait."""
        _check_block(values, start, self)
        contiguous = np.ascontiguousarray(values, dtype=np.float32)
        self._copy(start, contiguous.ctypes.data, contiguous.nbytes, HOST_TO_DEVICE)

    def grown(self, rows: int) -> "CudaMemory":
        """A larger copy on the same GPU."""
        larger = CudaMemory(rows, self.width, self.device)
        larger._copy(0, self.buffer.pointer, 4 * self.rows * self.width, DEVICE_TO_DEVICE)
        return larger

    def bind(self, binding: Any, name: str) -> None:
        """Bind the buffer itself."""
        shape = (self.rows, self.width)
        binding.bind_input(name, "cuda", self.device, np.float32, shape, self.buffer.pointer)

    def _copy(self, row: int, source: int, size_bytes: int, kind: int) -> None:
        self.buffer.copies.copy(self.buffer.pointer + 4 * row * self.width, source, size_bytes, kind)


def _check_block(values: np.ndarray, start: int, memory: Memory) -> None:
    """A block that does not fit must not end in other customers' rows, nor past the memory."""
    if values.ndim != 2 or values.shape[1] != memory.width or not 0 <= start <= memory.rows - len(values):
        raise ValueError(f"rows {list(values.shape)} from {start} do not fit [{memory.rows}, {memory.width}]")


def _too_large(rows: int, width: int, place: str) -> str:
    return f"a coefficient table of {rows} rows ({4e-9 * rows * width:.1f} GB) does not fit {place}"
