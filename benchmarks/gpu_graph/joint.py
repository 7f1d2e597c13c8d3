"""One product for query, key and value whose result attention takes as it is, head by head, without a Split.

`PackedMultiHeadAttention` takes `[tokens, heads, 3, size]` too. Columns of the joint weight are in that order, and the
query's bias is an input of the operator. Branches lie in the joint product as `branch_fusion` has them.
"""

from typing import Any

import torch
from torch import nn

from exporters.onnx.attention import Heads
from exporters.onnx.branch_fusion import FusedBranch, _ConcatenatedInput
from exporters.onnx.customer_rows import CustomerRows
from exporters.onnx.padding_free import Packing
from exporters.onnx.varlen import OPERATOR, VarlenPacking

TRIPLES = (("query", "key", "value"), ("q", "k", "v"))


class JointPacking(VarlenPacking):
    """As `VarlenPacking`, whose operator takes what the last joint product gave."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = torch.empty(0)
        self.bias: torch.Tensor | None = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        heads: Heads,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Packing.attend`."""
        if not self.flat:
            return super().attend(query, key, value, mask, heads, bias)
        self.attended += 1
        attributes: dict[str, Any] = {"num_heads": heads.queries}
        if heads.scale is not None:
            attributes["scale"] = heads.scale
        states = self.whole.squeeze(0).unflatten(1, (heads.queries, 3, -1))
        output = torch.onnx.ops.symbolic(
            f"com.microsoft::{OPERATOR}",
            (states, None, None, self.bias, self.offsets, self.borders, bias),
            attributes,
            dtype=query.dtype,
            shape=query.shape[1:],
            version=1,
        )
        return output.unsqueeze(0)


class _Joint(nn.Module):
    """`[..., in]` to `[..., heads * 3 * size]`, of three layers that read the same input."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, layers: list[Any], heads: int, rows: CustomerRows | None, packing: JointPacking) -> None:
        super().__init__()
        self.rows, self.heads, self.packing = rows, heads, packing
        branches = [layer for layer in layers if isinstance(layer, FusedBranch)]
        self.wide = branches[0].wide if branches else None
        height = len(branches[0].weight) if branches else layers[0].in_features
        parts = [_weight(layer, height) for layer in layers]
        joined = torch.stack([part.unflatten(1, (heads, -1)) for part in parts], 2)
        self.register_buffer("weight", joined.flatten(1), persistent=False)
        zero = torch.zeros(parts[0].shape[1], dtype=joined.dtype)
        biases = [zero if layer.bias is None else layer.bias.detach() for layer in layers]
        self.register_buffer("bias", torch.cat(biases), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x if self.wide is None or self.rows is None else self.rows.once(self.wide, x)
        return z @ self.weight


class _Column(nn.Module):
    """Query, key or value of the joint product."""

    def __init__(self, joint: _Joint, index: int) -> None:
        super().__init__()
        self.joint, self.index = joint, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joint, packing = self.joint, self.joint.packing
        if self.index == 0:
            packing.whole, packing.bias = joint(x), joint.bias
        size = len(joint.bias) // 3
        part = packing.whole.unflatten(-1, (joint.heads, 3, -1)).select(-2, self.index).flatten(-2)
        return part + joint.bias[self.index * size : (self.index + 1) * size]


def join_projections(model: Any, rows: CustomerRows | None, packing: JointPacking) -> None:
    """Make one product of query, key and value, in place; after biases were folded and branches fused."""
    for parent in list(model.modules()):
        for names in TRIPLES:
            layers = [getattr(parent, name, None) for name in names]
            if all(isinstance(layer, nn.Linear | FusedBranch) for layer in layers):
                joint = _Joint(layers, model.config.num_attention_heads, rows, packing)
                for index, name in enumerate(names):
                    setattr(parent, name, _Column(joint, index))


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


def _weight(layer: Any, height: int) -> torch.Tensor:
    weight = layer.weight.detach() if isinstance(layer, FusedBranch) else layer.weight.detach().T
    return nn.functional.pad(weight, (0, 0, 0, height - len(weight)))
