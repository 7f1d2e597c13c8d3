"""What a graph of packed attention takes: the tokens of a right-padded batch, one row behind the other.

Such a graph sees no batch, only tokens and where each row begins. So a captured graph fits any mixture of lengths: it
has a number of tokens and a number of rows, and rows that are not there are empty.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qrlora_deploy.runtime.bundle.packed_inputs import BORDERS, FIRSTS, INT32, OFFSETS, PLACES, ROWS, SEATS, packed_axes
from qrlora_deploy.runtime.bundle.row_layout import CUSTOMER_INPUTS, MERGED

STEPS = ((1024, 64), (4096, 128), (16384, 256))
"""Numbers of tokens are rounded up: up to the first number of a pair to a multiple of the second. Below 64 a product
takes no less time on a GPU, and further up a step is a sixteenth at most."""

LAST_STEP = 512

ALIGNED = 8
"""The kernel that adds a bias by distance wants lengths that are a multiple of this."""


def is_packed(session: Any) -> bool:
    """Whether the graph of a session takes packed tokens."""
    return any(value.name == BORDERS for value in session.get_inputs())


def packed_size(tokens: int, rows: int, length: int) -> int:
    """How many tokens a captured graph for up to `rows` rows of `length` computes on where there are `tokens`."""
    step = next((step for most, step in STEPS if tokens <= most), LAST_STEP)
    return min(-(-tokens // step) * step, rows * length)


def aligned_length(length: int) -> int:
    """The length that attention is told for rows of up to `length` tokens."""
    return -(-length // ALIGNED) * ALIGNED


def packed_names(session: Any) -> list[str]:
    """The inputs of a graph that are written from a batch."""
    names = [value.name for value in session.get_inputs()]
    return [name for name in names if name not in CUSTOMER_INPUTS and not name.startswith(MERGED)]


def packed_shapes(names: Iterable[str], rows: int, length: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of a graph's inputs `names`."""
    sizes = {"batch": rows, "batch + 1": rows + 1, "sequence": length, "tokens": tokens}
    return {name: tuple(sizes[str(axis)] for axis in packed_axes(name)) for name in names}


def write_packed(targets: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> None:
    """Fill the arrays `targets`, of `packed_shapes`, with a batch of right-padded rows `[batch, length]`.

    There may be more rows than the batch has, and more tokens; those belong to no row, and nobody reads them.
    """
    mask = inputs["attention_mask"]
    batch, length = mask.shape
    lengths = (mask != 0).sum(1)
    kept = np.flatnonzero(mask)
    places = kept % length
    rows = np.repeat(np.arange(batch), lengths)
    count = len(kept)
    for name, target in targets.items():
        if name == BORDERS:
            target[0] = 0
            np.cumsum(lengths, out=target[1 : batch + 1])
            target[batch + 1 :] = count
        elif name == OFFSETS:
            _write_offsets(target, lengths, rows * target.shape[1] + places)
        elif name == FIRSTS:
            target[0], target[batch:] = 0, 0
            np.cumsum(lengths[:-1], out=target[1:batch])
        elif name == SEATS:
            # A position without a token gets one of its own row: what another customer's are must not matter.
            target[:] = 0
            target[:batch] = np.append(0, np.cumsum(lengths[:-1]))[:, None]
            target.reshape(-1)[rows * target.shape[1] + places] = np.arange(count)
        elif name == "attention_mask":
            target[:] = 0
            target[:batch, :length] = mask[:, : target.shape[1]]
        else:
            values = places if name == PLACES else rows if name == ROWS else inputs[name].reshape(-1)[kept]
            target[:count], target[count:] = values, 0


def _write_offsets(target: np.ndarray, lengths: np.ndarray, positions: np.ndarray) -> None:
    flat, whole = target.reshape(-1), target.shape[1]
    flat[: len(positions)] = positions
    present = np.arange(whole) < np.append(lengths, np.zeros(len(target) - len(lengths), dtype=np.int64))[:, None]
    flat[len(positions) :] = np.flatnonzero(~present)


def packed_arrays(
    inputs: Mapping[str, np.ndarray], names: Iterable[str], rows: int, length: int, tokens: int
) -> dict[str, np.ndarray]:
    """New arrays by name, as `write_packed` fills them."""
    shapes = packed_shapes(names, rows, length, tokens)
    arrays = {name: np.empty(shape, dtype_of(name)) for name, shape in shapes.items()}
    write_packed(arrays, inputs)
    return arrays


def pack_batch(inputs: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """The inputs `names` of a graph for a batch as it comes: no empty rows and no more tokens than there are."""
    mask = inputs["attention_mask"]
    return packed_arrays(inputs, names, len(mask), aligned_length(mask.shape[1]), int((mask != 0).sum()))


def dtype_of(name: str) -> "np.dtype[Any]":
    """Of an input of tokens or rows."""
    return np.dtype(np.int32 if name in INT32 else np.int64)
