"""Key-value buffers of rows that hold the same number of tokens, bound to the graph in place."""

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class CacheShape:
    """What a graph keeps of every token.

    Attributes:
        layers: each has keys and values.
        heads: of keys and values.
        head_size: numbers of a head.
        dtype: of the arrays; bf16, which numpy lacks, lies in uint16.
        element: ONNX's number of the type.
    """

    layers: int
    heads: int
    head_size: int
    dtype: "np.dtype[Any]"
    element: int

    @property
    def names(self) -> list[str]:
        """Of the buffers, without what the graph puts before them."""
        return [f"{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]

    def token_bytes(self, tokens: int = 1) -> int:
        """Bytes of so many tokens of one row."""
        return 2 * self.layers * self.heads * self.head_size * self.dtype.itemsize * tokens


@dataclass(frozen=True)
class Block:
    """Keys and values of some tokens of one row.

    Attributes:
        arrays: `[heads, tokens, head_size]` for each buffer.
    """

    arrays: list[np.ndarray]

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(array.nbytes for array in self.arrays)


class CacheRows(ABC):
    """Buffers `[rows, heads, capacity, head_size]`, keys and values of each layer, wherever they lie.

    Args:
        shape: of the graph.
        capacity: tokens of a row.

    Attributes:
        rows: rows that there is memory for.
        generation: changes when the buffers lie elsewhere.
    """

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        self.shape, self.capacity = shape, capacity
        self.rows = self.generation = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape.token_bytes(self.capacity)

    def resize(self, rows: int) -> None:
        """Have memory for so many rows; the first ones keep what they hold.

        Raises:
            MemoryError: there is not so much; all rows are as they were.
        """
        self.generation += 1
        try:
            self._replace_all(rows, min(rows, self.rows))
        except MemoryError:
            # A buffer with more rows than are used does no harm, but others may want its memory.
            if rows > self.rows:
                with suppress(MemoryError):
                    self._replace_all(self.rows, self.rows)
                raise
        self.rows = rows

    @abstractmethod
    def _replace_all(self, rows: int, kept: int) -> None:
        """Make each buffer one of so many rows, one buffer after the other, the first `kept` rows as they were."""


class KvCache(CacheRows):
    """Buffers in arrays of the host."""

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        super().__init__(shape, capacity)
        self._arrays = [self._empty(0) for _ in shape.names]

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of a row to another row."""
        for array in self._arrays:
            array[target, :, :tokens] = array[source, :, :tokens]

    def clear_row(self, row: int) -> None:
        """Make a row zero."""
        for array in self._arrays:
            array[row] = 0

    def read(self, row: int, start: int, end: int) -> Block:
        """A copy of some tokens of a row."""
        return Block([array[row, :, start:end].copy() for array in self._arrays])

    def write(self, row: int, start: int, block: Block) -> None:
        """Put tokens into a row."""
        for array, part in zip(self._arrays, block.arrays, strict=True):
            array[row, :, start : start + part.shape[1]] = part

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Give `count` rows from `first` on to an `onnxruntime.IOBinding`, as past and as present."""
        for name, array in zip(self.shape.names, self._arrays, strict=True):
            part = array[first : first + count]
            place = ("cpu", 0, self.shape.element, part.shape, part.ctypes.data)
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def _replace_all(self, rows: int, kept: int) -> None:
        for index, array in enumerate(self._arrays):
            # One after the other: no more than one array is there twice.
            changed = self._empty(rows)
            changed[:kept] = array[:kept]
            self._arrays[index] = changed

    def _empty(self, rows: int) -> np.ndarray:
        # Zeros, since NaN in a place that no row attends would still spoil a product with zero.
        return np.zeros((rows, self.shape.heads, self.capacity, self.shape.head_size), dtype=self.shape.dtype)
