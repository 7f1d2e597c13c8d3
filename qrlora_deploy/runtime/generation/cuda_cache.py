"""Key-value buffers on a GPU, which never leave it."""

from dataclasses import dataclass
from typing import Any

from qrlora_deploy.runtime.generation.cache import CacheRows, CacheShape
from qrlora_deploy.runtime.table.cuda import DEVICE_TO_DEVICE, CudaBuffer, CudaCopies, Pieces


@dataclass(frozen=True)
class CudaBlock:
    """Keys and values of some tokens of one row, one buffer `[heads, tokens, head_size]` behind the other.

    Attributes:
        tokens: how many.
        nbytes: of all of them.
    """

    buffer: CudaBuffer
    tokens: int
    nbytes: int


class CudaKvCache(CacheRows):
    """As `KvCache`, on a GPU.

    Args:
        shape: of the graph.
        capacity: tokens of a row.
        device: number of the GPU.
    """

    def __init__(self, shape: CacheShape, capacity: int, device: int = 0) -> None:
        super().__init__(shape, capacity)
        self._device = device
        self._copies = CudaCopies(device)
        self._head_bytes = shape.head_size * shape.dtype.itemsize * capacity
        self._part_bytes = self._head_bytes * shape.heads
        self._buffers: list[CudaBuffer | None] = [None for _ in shape.names]

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        """Copy a row, its first `tokens` at least, to another row."""
        for buffer in self._filled():
            here, there = (buffer.pointer + self._part_bytes * row for row in (source, target))
            self._copies.begin_copy(there, here, self._part_bytes, DEVICE_TO_DEVICE)
        self._copies.wait()

    def clear_row(self, row: int) -> None:
        """Make a row zero."""
        for buffer in self._filled():
            self._copies.clear(buffer.pointer + self._part_bytes * row, self._part_bytes)

    def read(self, row: int, start: int, end: int) -> CudaBlock:
        """A copy, on the GPU, of some tokens of a row.

        Raises:
            MemoryError: the GPU has no room.
        """
        size_bytes = self.shape.token_bytes(end - start)
        block = CudaBlock(CudaBuffer(size_bytes, self._device, self._copies), end - start, size_bytes)
        self._copy(row, start, block, out=True)
        return block

    def write(self, row: int, start: int, block: CudaBlock) -> None:
        """Put tokens into a row."""
        self._copy(row, start, block, out=False)

    def take(self, row: int, other: "CudaKvCache", tokens: int) -> None:
        """Put the first tokens of the first row of another cache at the beginning of a row."""
        size_bytes = self.shape.head_size * self.shape.dtype.itemsize * tokens
        for buffer, source in zip(self._filled(), other._filled(), strict=True):
            there = Pieces(buffer.pointer + self._part_bytes * row, self._head_bytes)
            here = Pieces(source.pointer, other._head_bytes)
            self._copies.begin_pieces(there, here, size_bytes, self.shape.heads, DEVICE_TO_DEVICE)
        self._copies.wait()

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Give `count` rows from `first` on to an `onnxruntime.IOBinding`, as past and as present."""
        shape = (count, self.shape.heads, self.capacity, self.shape.head_size)
        for name, buffer in zip(self.shape.names, self._filled(), strict=True):
            pointer = buffer.pointer + self._part_bytes * first
            place = ("cuda", self._device, self.shape.element, shape, pointer)
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def _replace_all(self, rows: int, kept: int) -> None:
        for index, buffer in enumerate(self._buffers):
            # One after the other: no more than one buffer is there twice.
            changed = CudaBuffer(self._part_bytes * rows, self._device, self._copies) if rows else None
            if changed is not None and buffer is not None and kept:
                self._copies.copy(changed.pointer, buffer.pointer, self._part_bytes * kept, DEVICE_TO_DEVICE)
            self._buffers[index] = changed

    def _filled(self) -> list[CudaBuffer]:
        return [buffer for buffer in self._buffers if buffer is not None]

    def _copy(self, row: int, start: int, block: CudaBlock, out: bool) -> None:
        """Between a row and a block: a piece for each head of each buffer."""
        token_bytes = self.shape.head_size * self.shape.dtype.itemsize
        size_bytes, heads = token_bytes * block.tokens, self.shape.heads
        place = block.buffer.pointer
        for buffer in self._filled():
            inside = Pieces(buffer.pointer + self._part_bytes * row + token_bytes * start, self._head_bytes)
            outside = Pieces(place, size_bytes)
            pair = (outside, inside) if out else (inside, outside)
            self._copies.begin_pieces(*pair, size_bytes, heads, DEVICE_TO_DEVICE)
            place += size_bytes * heads
        self._copies.wait()
