"""Where the rows of a coefficient table lie: an array of the host, or one buffer of a GPU."""

import threading
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.table.cuda import DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE, CudaBuffer, pinned_bytes

FP32 = np.dtype(np.float32)

LEAVING = 32
"""Rows that may wait for their copy to a GPU, or be on their way there, at once."""

WAITING = 16
"""Rows of those whose copies nobody has begun."""


class Memory(Protocol):
    """Rows of one dtype that ONNX Runtime reads while single rows are written.

    A row that no run reads may be written at any time; which rows these are is the table's affair.
    """

    rows: int
    width: int
    dtype: "np.dtype[Any]"

    def write(self, row: int, values: np.ndarray) -> None:
        """Copy `values [width]` into a row; it is there after the next `settle`."""

    def settle(self) -> None:
        """Wait until every row is there that was written before. For any number of threads."""

    def write_rows(self, start: int, values: np.ndarray) -> None:
        """Copy `values [n, width]` into the rows from `start` on, in one go."""

    def read_rows(self, start: int, count: int) -> np.ndarray:
        """A copy `[count, width]` of the rows from `start` on."""

    def staging(self, rows: int) -> np.ndarray:
        """Host memory `[rows, width]`, zero, from which `write_rows` copies as fast as it can."""

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

    @property
    def size_bytes(self) -> int:
        """Of all rows."""
        return sum(part.rows * part.width * part.dtype.itemsize for part in self.parts.values())

    def write(self, row: int, values: dict[str, np.ndarray]) -> None:
        """Copy `values`, a row `[width]` for every input; they are there after the next `settle`."""
        for name, part in self.parts.items():
            part.write(row, values[name])

    def holds(self, row: int, values: dict[str, np.ndarray]) -> bool:
        """Whether a row, which nobody writes meanwhile, has exactly the bytes of `values`."""
        self.settle()
        return all(
            part.read_rows(row, 1).tobytes() == values[name].astype(part.dtype, copy=False).tobytes()
            for name, part in self.parts.items()
        )

    def settle(self) -> None:
        """Wait until every row is there that was written before. For any number of threads."""
        for part in self.parts.values():
            part.settle()

    def write_rows(self, start: int, values: dict[str, np.ndarray]) -> None:
        """Copy `values`, rows `[n, width]` for every input, to the rows from `start` on, and wait."""
        for name, part in self.parts.items():
            part.write_rows(start, values[name])

    def grown(self, rows: int) -> "TableMemory":
        """A larger copy."""
        return TableMemory({name: part.grown(rows) for name, part in self.parts.items()})

    def bind(self, binding: Any) -> None:
        """Bind every part to the input of its name."""
        for name, part in self.parts.items():
            part.bind(binding, name)


def make_memory(
    widths: dict[str, int], rows: int, provider: str | Device, dtypes: Mapping[str, "np.dtype[Any]"] | None = None
) -> TableMemory:
    """Zeroed memory for inputs of these `widths`, where a session of this provider or device runs.

    Args:
        dtypes: of the inputs; those that are not there are fp32.

    Raises:
        QrloraError: it does not fit.
        ProviderError: CUDA is not there.
    """
    device, of = Device.of(provider), dtypes or {}

    def make(width: int, dtype: "np.dtype[Any]") -> Memory:
        return CudaMemory(rows, width, dtype, device.index) if device.on_gpu else HostMemory(rows, width, dtype)

    return TableMemory({name: make(width, of.get(name, FP32)) for name, width in widths.items()})


class HostMemory:
    """Rows in one numpy array `[rows, width]`, zero at the start."""

    def __init__(self, rows: int, width: int, dtype: "np.dtype[Any]" = FP32) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        try:
            self.array = np.zeros((rows, width), dtype=dtype)
        except MemoryError as error:
            raise QrloraError(_too_large(self, "the host")) from error
        # Made once and kept with its array: it only points to the array's memory.
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy(self.array)

    def write(self, row: int, values: np.ndarray) -> None:
        """Copy `values [width]` into a row."""
        self.array[row] = values

    def settle(self) -> None:
        """Nothing to do: a row is there when `write` returns."""

    def write_rows(self, start: int, values: np.ndarray) -> None:
        """Copy `values [n, width]` into the rows from `start` on."""
        _check_block(values, start, self)
        self.array[start : start + len(values)] = values

    def read_rows(self, start: int, count: int) -> np.ndarray:
        """A copy of the rows from `start` on."""
        return self.array[start : start + count].copy()

    def staging(self, rows: int) -> np.ndarray:
        """Plain memory."""
        return np.zeros((rows, self.width), dtype=self.dtype)

    def grown(self, rows: int) -> "HostMemory":
        """A larger copy."""
        larger = HostMemory(rows, self.width, self.dtype)
        larger.array[: self.rows] = self.array
        return larger

    def bind(self, binding: Any, name: str) -> None:
        """Bind the array itself."""
        binding.bind_ortvalue_input(name, self.value)


class CudaMemory:
    """Rows in one buffer of a GPU, zero at the start.

    A single row is copied beside whatever runs. Who writes it only leaves it in pinned memory, for a thread that slept
    finds the driver's code in no cache; the copies of all rows that were left are begun by who reads next and has to
    wait for them, or where nobody reads, one by one by those who write more.
    """

    def __init__(self, rows: int, width: int, dtype: "np.dtype[Any]" = FP32, device: int = 0) -> None:
        self.rows, self.width, self.dtype, self.device = rows, width, dtype, device
        self._row_bytes = dtype.itemsize * width
        try:
            self.buffer = CudaBuffer(rows * self._row_bytes, device)
        except MemoryError as error:
            raise QrloraError(_too_large(self, f"GPU {device}")) from error
        leaving = self.staging(LEAVING)
        # Asked for once: numpy takes longer to tell an address than to copy a row.
        self._leaving = [(row, int(row.ctypes.data)) for row in leaving]
        self._targets = [0] * LEAVING
        self._pointer, self._begin = self.buffer.pointer, self.buffer.copies.begin_copy
        self._beginning = threading.Lock()
        # How many rows were ever left, of how many copies were begun, and of how many they are done.
        self._left = self._begun = self._settled = 0

    def write(self, row: int, values: np.ndarray) -> None:
        """Leave `values [width]` for a row; it is there after the next `settle`."""
        left = self._left
        if left - self._begun >= WAITING:
            self._begin_copies(self._begun + 1)
        if left - self._settled >= LEAVING:
            # Before memory is written again from which an earlier row may still be on its way.
            self._wait(self._begun)
        turn = left % LEAVING
        self._leaving[turn][0][:] = values
        self._targets[turn] = self._pointer + self._row_bytes * row
        self._left = left + 1

    def settle(self) -> None:
        """Wait until every row is there that was written before. For any number of threads."""
        left = self._left
        if self._settled < left:
            self._begin_copies(left)
            self._wait(left)

    def _begin_copies(self, count: int) -> None:
        """Begin the copies of the first `count` rows that were ever left, but for those that are begun."""
        with self._beginning:
            while self._begun < count:
                turn = self._begun % LEAVING
                self._begin(self._targets[turn], self._leaving[turn][1], self._row_bytes)
                self._begun += 1

    def _wait(self, begun: int) -> None:
        """Wait for the first `begun` copies."""
        self.buffer.copies.wait()
        # Where another thread is further, this only makes somebody ask once more.
        self._settled = begun

    def write_rows(self, start: int, values: np.ndarray) -> None:
        """Copy `values [n, width]` into the rows from `start` on, with one copy, and wait."""
        _check_block(values, start, self)
        contiguous = np.ascontiguousarray(values, dtype=self.dtype)
        # What was left for these rows before must not come behind it.
        self.settle()
        self._copy(start, contiguous.ctypes.data, contiguous.nbytes, HOST_TO_DEVICE)

    def read_rows(self, start: int, count: int) -> np.ndarray:
        """A copy on the host of the rows from `start` on."""
        found = np.zeros((count, self.width), dtype=self.dtype)
        _check_block(found, start, self)
        self.settle()
        place = self.buffer.pointer + self._row_bytes * start
        self.buffer.copies.copy(found.ctypes.data, place, found.nbytes, DEVICE_TO_HOST)
        return found

    def staging(self, rows: int) -> np.ndarray:
        """Pinned memory."""
        return pinned_bytes(rows * self._row_bytes, self.device).view(self.dtype).reshape(rows, self.width)

    def grown(self, rows: int) -> "CudaMemory":
        """A larger copy on the same GPU."""
        larger = CudaMemory(rows, self.width, self.dtype, self.device)
        # Its copies follow another stream.
        self.settle()
        larger._copy(0, self.buffer.pointer, self.rows * self._row_bytes, DEVICE_TO_DEVICE)
        return larger

    def bind(self, binding: Any, name: str) -> None:
        """Bind the buffer itself."""
        shape = (self.rows, self.width)
        binding.bind_input(name, "cuda", self.device, self.dtype.type, shape, self.buffer.pointer)

    def _copy(self, row: int, source: int, size_bytes: int, kind: int) -> None:
        self.buffer.copies.copy(self.buffer.pointer + self._row_bytes * row, source, size_bytes, kind)


def _check_block(values: np.ndarray, start: int, memory: Memory) -> None:
    """A block that does not fit must not end in other customers' rows, nor past the memory."""
    if values.ndim != 2 or values.shape[1] != memory.width or not 0 <= start <= memory.rows - len(values):
        raise ValueError(f"rows {list(values.shape)} from {start} do not fit [{memory.rows}, {memory.width}]")


def _too_large(memory: Memory, place: str) -> str:
    size_gb = 1e-9 * memory.rows * memory.width * memory.dtype.itemsize
    return f"a coefficient table of {memory.rows} rows ({size_gb:.1f} GB) does not fit {place}"
