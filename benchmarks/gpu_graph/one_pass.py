"""A branch's input by a larger product and no join, which was tried."""

from typing import Any

import torch

from exporters.onnx.branch_fusion import _ConcatenatedInput
from exporters.onnx.customer_rows import CustomerRows
from exporters.onnx.padding_free import Packing


class RowsWithOnes(CustomerRows):
    """Coefficients of a part as `[1, ..., 1, c]`, by the width of what they are beside; all laid out at once."""

    widths: tuple[int, ...] = ()

    def _tokens_part(self, part: int, packing: Packing) -> torch.Tensor:
        if not self.widths:
            return super()._tokens_part(part, packing)
        if part not in self._by_token:
            one = torch.ones_like(self._gathered[:, :1])
            ones = {width: one.expand(-1, width) for width in set(self.widths)}
            pieces = []
            for width, own in zip(self.widths, self._by_row, strict=True):
                pieces += [ones[width], own.squeeze(1)]
            sizes = [width + own.shape[2] for width, own in zip(self.widths, self._by_row, strict=True)]
            laid = packing.by_token(torch.cat(pieces, 1))
            self._by_token |= dict(enumerate(torch.split(laid, sizes, dim=2)))
        return self._by_token[part]


class _OnePass(_ConcatenatedInput):
    """`[x, c * (x R)]` as `[1, c] * (x [I, R])`: a larger product, and no join."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.r) * self.rows.coefficients(self.part, x, self.name)


def join_by_products(model: Any, rows: RowsWithOnes) -> None:
    """Make the inputs of fused branches by `_OnePass`, in place; after `join_projections`."""
    wides = {id(it): it for it in model.modules() if isinstance(it, _ConcatenatedInput)}
    for wide in wides.values():
        wide.__class__ = _OnePass
        wide.r = torch.cat([torch.eye(len(wide.r), dtype=wide.r.dtype), wide.r], 1)
    rows.widths = tuple(len(wide.r) for wide in sorted(wides.values(), key=lambda it: it.part))
