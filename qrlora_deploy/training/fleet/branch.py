"""The side branch and the output layer of many customers at once: each row of a batch has its own."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.adapter import QRLoRALinear, SideBranch, attach, detach, precondition, resolve_layer

RANK_STEP = 8
"""Ranks are padded to a multiple of this by zeros: a GPU multiplies bf16 matrices of other sizes many times slower."""


class RowValues:
    """What the layers of a model read while a batch runs.

    Attributes:
        parts: `[rows, padded rank]` fp32 a target, the coefficients of each row's customer.
        token_rows: `[tokens]` int64, the row of each token where a batch has no padding.
        slots: `[rows]` int64, the customer's row in the tables.
        places: `[rows]` int64, which row this is among those of its customer in the batch.
        places_end: one more than the largest of `places`.
        head_weight: `[slots, labels, width]`, where customers have output layers of their own.
        head_bias: `[slots, labels]`, or None.
    """

    parts: tuple[torch.Tensor, ...]
    token_rows: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    places_end: int
    head_weight: torch.Tensor
    head_bias: torch.Tensor | None


class RowLinear(SideBranch):
    """`y = base(x) + Q (c * (R x))` with another `c` in each row, as `QRLoRALinear` computes it.

    Args:
        adapter: the layer and its factors.
        values: where the coefficients of the current batch are.
        part: which of them belong to this layer.
    """

    q: torch.Tensor
    r: torch.Tensor

    def __init__(self, adapter: QRLoRALinear, values: RowValues, part: int) -> None:
        super().__init__()
        self.base = adapter.base
        more = padded_rank(len(adapter.scale)) - len(adapter.scale)
        self.register_buffer("q", functional.pad(adapter.q, (0, more)), persistent=False)
        self.register_buffer("r", functional.pad(adapter.r, (0, 0, 0, more)), persistent=False)
        self.values = values
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows, ..., in]` to `[rows, ..., out]`, or `[tokens, in]` to `[tokens, out]`."""
        projected = functional.linear(x, self.r)
        c = self.values.parts[self.part]
        if len(x) != len(c) > 1:
            # Tokens of all rows one after another. Where there are as many as rows, each row has one;
            # and coefficients of one row are everyone's.
            c = c.index_select(0, self.values.token_rows)
        # Cast after the look-up: its gradient is a sum over tokens, which bf16 would round at each.
        c = c.view(len(c), *[1] * (x.dim() - 2), -1).to(projected.dtype)
        return self.base(x) + functional.linear(projected * c, self.q)


class RowHead(nn.Module):
    """A linear output layer with another weight in each row.

    Rows are sorted to their customers first, so that weights are read once a customer and not
    copied once a row.
    """

    def __init__(self, values: RowValues) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows, ..., width]` to `[rows, ..., labels]`."""
        values = self.values
        weight = values.head_weight
        where = values.slots * values.places_end + values.places
        sorted_rows = x.new_zeros(len(weight) * values.places_end, *x.shape[1:]).index_copy(0, where, x)
        by_customer = sorted_rows.view(len(weight), -1, x.shape[-1])
        if values.head_bias is None:
            answers = torch.bmm(by_customer, weight.transpose(1, 2))
        else:
            answers = torch.baddbmm(values.head_bias.unsqueeze(1), by_customer, weight.transpose(1, 2))
        return answers.reshape(len(sorted_rows), *x.shape[1:-1], weight.shape[1]).index_select(0, where)


def padded_rank(rank: int) -> int:
    """The rank with which a layer is computed; coefficients of the padding have no gradient and stay 0."""
    return -(-rank // RANK_STEP) * RANK_STEP


def attach_rows(model: Any, basis: Basis, values: RowValues) -> torch.Tensor:
    """Put a side branch of rows beside every target of `basis`, and freeze the model.

    Returns:
        `[sum of padded ranks]` fp32, the scale of `adapter.precondition`: `c = scale * u`, and `u` is trained.

    Raises:
        InputError: a layer is missing.
        BasisMismatchError: a shape differs.
    """
    adapters = attach(model, basis)
    precondition(adapters)
    scales = [adapter.scale for adapter in adapters.values()]
    scale = torch.cat([functional.pad(own, (0, padded_rank(len(own)) - len(own)), value=1.0) for own in scales])
    detach(model)
    for part, (name, adapter) in enumerate(adapters.items()):
        model.set_submodule(resolve_layer(model, name)[0], RowLinear(adapter, values, part))
    return scale
