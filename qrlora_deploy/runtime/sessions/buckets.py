"""Shapes that a session runs in: a request is padded up to the next one."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.bundle.bundle import Manifest


@dataclass(frozen=True)
class Buckets:
    """Every batch size with every length.

    Attributes:
        batches: rows of a batch.
        lengths: tokens of a row. Both are kept in rising order.

    Raises:
        InputError: there is none, or one is not positive.
    """

    batches: tuple[int, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("batches", "lengths"):
            sizes = sorted(set(getattr(self, name)))
            if not sizes or sizes[0] < 1:
                raise InputError(f"buckets need {name} of at least 1, not {list(getattr(self, name))}")
            object.__setattr__(self, name, tuple(sizes))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((batch, length) for batch in self.batches for length in self.lengths)

    def fit(self, batch: int, length: int) -> tuple[int, int] | None:
        """The smallest bucket that holds `batch` rows of `length` tokens; None where none does."""
        rows = next((size for size in self.batches if size >= batch), None)
        tokens = next((size for size in self.lengths if size >= length), None)
        return None if rows is None or tokens is None else (rows, tokens)


def filling(manifest: Manifest) -> dict[str, int]:
    """What the text inputs are padded with; attention is 0 there."""
    return {"input_ids": manifest.pad_token_id, "token_type_ids": manifest.pad_token_type_id}


def pad_into(target: np.ndarray, values: np.ndarray, fill: int, first: int) -> None:
    """Write `values [batch, length]` into `target [more rows, more tokens]`, and `fill` around them.

    Args:
        first: what a row beyond the batch begins with. Attention to nothing at all would be NaN.
    """
    batch, length = values.shape
    target[:batch, :length] = values
    target[:batch, length:] = fill
    target[batch:] = fill
    target[batch:, 0] = first
