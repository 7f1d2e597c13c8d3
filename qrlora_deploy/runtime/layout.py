"""Where a customer's numbers stand in a row of the coefficient table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qrlora_deploy.errors import InputError

RANK_MULTIPLE = 8
"""Ranks are padded with zeros to a multiple of this in a switchable graph: tensor cores want it."""

TABLE, HEAD_TABLE, SLOT = "coefficient_table", "head_table", "slot"
"""Inputs of a switchable graph beside the text: `[slots, width]`, `[slots, head width]`, `[batch]`."""

BASE_HEAD_FILE = "base_head.safetensors"
"""The base's own output layer, in a bundle whose customers may have other ones."""


def padded_rank(rank: int) -> int:
    """`rank` rounded up to a multiple of `RANK_MULTIPLE`."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


class TableLayout:
    """The order and width of a table row: target after target, each padded.

    Args:
        ranks: rank of each target, in the basis's order.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.padded_ranks = tuple(padded_rank(rank) for rank in ranks)

    @property
    def width(self) -> int:
        """Columns of the table."""
        return sum(self.padded_ranks)

    @property
    def total_rank(self) -> int:
        """Numbers of a customer."""
        return sum(self.ranks)

    @cached_property
    def columns(self) -> np.ndarray:
        """`[total_rank]`: the column of each of a customer's numbers."""
        starts = np.cumsum((0, *self.padded_ranks[:-1]))
        return np.concatenate([start + np.arange(rank) for start, rank in zip(starts, self.ranks, strict=True)])

    def row(self, values: np.ndarray) -> np.ndarray:
        """A customer's `values [total_rank]` as a row `[width]` fp32; the padding is zero.

        Raises:
            InputError: the length does not fit.
        """
        if values.shape != (self.total_rank,):
            raise InputError(
                f"a customer of this bundle has {self.total_rank} coefficients, not {'x'.join(map(str, values.shape))}"
            )
        row = np.zeros(self.width, dtype=np.float32)
        row[self.columns] = values
        return row


@dataclass(frozen=True)
class HeadLayout:
    """The order of a customer's output layer in a row of the head table: weights, label by label, then biases.

    Attributes:
        labels: most labels that a customer may have.
        features: inputs of the layer.
    """

    labels: int
    features: int

    @property
    def width(self) -> int:
        """Columns of the head table."""
        return self.labels * (self.features + 1)

    def row(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """`weight [labels, features]` and `bias [labels]` as a row `[width]` fp32.

        Where the customer has no label the bias is -inf: such a label has the probability zero.

        Raises:
            InputError: the shapes do not fit.
        """
        count = len(weight)
        if not 0 < count <= self.labels:
            raise InputError(f"a head has {count} labels, but there is room for {self.labels}")
        if weight.shape != (count, self.features) or bias.shape != (count,):
            expected = f"[{count}, {self.features}] and [{count}]"
            raise InputError(f"a head has shapes {list(weight.shape)} and {list(bias.shape)}, not {expected}")
        row = np.zeros(self.width, dtype=np.float32)
        row[: weight.size] = weight.reshape(-1)
        biases = row[self.labels * self.features :]
        biases[:] = -np.inf
        biases[:count] = bias
        return row


def head_arrays(head: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Weight `[labels, features]` and bias `[labels]` of an output layer, from its tensors by name.

    Raises:
        InputError: it is not one linear layer.
    """
    weights = [array for array in head.values() if array.ndim == 2]
    biases = [array for array in head.values() if array.ndim == 1]
    if len(weights) != 1 or len(biases) > 1 or len(head) > 2:
        raise InputError(f"a head must be one linear layer, not {', '.join(sorted(head))}")
    return weights[0], biases[0] if biases else np.zeros(len(weights[0]), dtype=np.float32)
