"""Where a customer's numbers stand in a row of the coefficient table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qrlora_deploy.errors import InputError, argument

RANK_MULTIPLE = 8
"""Ranks are padded with zeros to a multiple of this in a switchable graph: tensor cores want it."""

TABLE, HEAD_TABLE, SLOT = "coefficient_table", "head_table", "slot"
"""Inputs of a switchable graph beside the text: `[slots, width]`, `[slots, head width]`, `[batch]`."""

COEFFICIENTS, HEAD = "coefficients", "head"
"""Inputs of a per-row graph beside the text: `[batch, width]`, `[batch, head width]`; a row as in a table."""

MERGED = "merged:"
"""What begins the name of an input or output that is the weight `[in, out]` of a target, with one customer in it."""

CUSTOMER_INPUTS = (TABLE, HEAD_TABLE, SLOT, COEFFICIENTS, HEAD)
"""All of these: inputs that are not of the text."""

TABLE_OF = {COEFFICIENTS: TABLE, HEAD: HEAD_TABLE}
"""The table whose row each of them is."""

TABLE_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
"""What a coefficient table may hold, by the name of the option; coefficients files are fp32, and a row is
rounded once, when it is made. The head table is fp32 beside either."""

LARGEST_HALF = float(np.finfo(np.float16).max)
LARGEST_SQUARE = LARGEST_HALF**2

BASE_HEAD_FILE = "base_head.safetensors"
"""The base's own output layer, in a bundle whose customers may have other ones."""


def padded_rank(rank: int) -> int:
    """`rank` rounded up to a multiple of `RANK_MULTIPLE`."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


class TableLayout:
    """The order and width of a table row: target after target, each padded.

    Args:
        ranks: rank of each target, in the basis's order.
        dtype: of the table, "fp32" or "fp16".
    """

    def __init__(self, ranks: Sequence[int], dtype: str = "fp32") -> None:
        self.ranks = tuple(ranks)
        self.padded_ranks = tuple(padded_rank(rank) for rank in ranks)
        self.dtype = TABLE_DTYPES[dtype]
        self._half = dtype == "fp16"

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
        """A customer's `values [total_rank]` fp32 as a row `[width]` of the table's dtype; the padding is zero.

        Where the row would be no other it is `values` itself.

        Raises:
            InputError: the length does not fit, or a value is out of the range of fp16.
        """
        # Facts that do not change are looked up, not computed: a swap of a customer comes through here.
        total_rank, width, padded = self._sizes
        if values.shape != (total_rank,):
            raise InputError(
                f"a customer of this bundle has {total_rank} coefficients, not {'x'.join(map(str, values.shape))}"
            )
        # A length below the limit has no coordinate above it; all customers but strange ones stop here.
        if self._half and not values.dot(values) < LARGEST_SQUARE:
            check_half_range(values)
        if not padded:
            return values.astype(self.dtype, copy=False)
        row = np.zeros(width, dtype=self.dtype)
        row[self.columns] = values
        return row

    def values(self, row: np.ndarray) -> np.ndarray:
        """A customer's numbers `[total_rank]` fp32 from its row `[width]`: `row`, the other way round."""
        return row[self.columns].astype(np.float32)

    @cached_property
    def _sizes(self) -> tuple[int, int, bool]:
        """Total rank, width, and whether there is padding."""
        return self.total_rank, self.width, self.width > self.total_rank


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


def check_half_range(values: np.ndarray) -> None:
    """Make sure that fp16 can hold `values` fp32, rounded.

    Raises:
        InputError: it cannot.
    """
    with np.errstate(over="ignore"):
        wrong = values[~np.isfinite(values.astype(np.float16))]
    if wrong.size:
        raise InputError(
            f"the coefficient {wrong[0]:.4g} is more than fp16 can hold ({LARGEST_HALF:.0f}); serve it from a "
            f"bundle exported with {argument('table_dtype', 'fp32')}"
        )


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
