"""The graphs that are compared, and ways of attention that are tried here before the product takes them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from benchmarks.gpu_graph.one_pass import RowsWithOnes
from benchmarks.gpu_graph.shapes import Setup
from exporters.onnx.attention import Heads, attend
from exporters.onnx.bias_folding import fold_attention_biases
from exporters.onnx.customer_rows import CustomerRows
from exporters.onnx.padding_free import Packing
from exporters.onnx.varlen import VarlenPacking

PAPER = Setup(("query", "q"), last_layers=4, rank=160, spread=10.0)
"""The paper's set-up: query, last 4 layers; tau = 0.5 gives 157 to 163 directions, padded to 160."""
WIDE = Setup(("query", "value", "q", "v"), last_layers=12, rank=160, spread=1.0)

TRIPLES = (("query", "key", "value"), ("q", "k", "v"))


class MaskPacking(Packing):
    """Attention gets the mask of the batch, and every token its own place."""

    by_lengths = False


def attend_float(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    heads: Heads,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `attention.attend`, with a mask that is turned into numbers once and not by each operator."""
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype)
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype), lowest)
    return attend(query, key, value, mask, heads, bias)


class RowsByPart(CustomerRows):
    """Coefficients are laid out per token block by block, and not once for up to 4,096 columns."""

    def _tokens_part(self, part: int, packing: Packing) -> torch.Tensor:
        return packing.by_token(self._by_row[part].squeeze(1))


class _Shared:
    """One product for three layers, computed when the first of them sees an input."""

    def __init__(self, linear: nn.Linear, sizes: list[int]) -> None:
        self.linear, self.sizes = linear, sizes
        self.seen: torch.Tensor | None = None
        self.parts: tuple[torch.Tensor, ...] = ()


class _Part(nn.Module):
    def __init__(self, shared: _Shared, index: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias
        self.linear = shared.linear
        self.shared = shared
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        shared = self.shared
        if shared.seen is not x:
            shared.seen, shared.parts = x, self.linear(x).split(shared.sizes, -1)
        part = shared.parts[self.index]
        return part if self.bias is None else part + self.bias


def fuse_projections(model: nn.Module) -> None:
    """Make one product of query, key and value of a merged model, in place.

    Biases of keys and values are folded first. That of the query is added behind the product.
    """
    fold_attention_biases(model)
    for parent in list(model.modules()):
        for names in TRIPLES:
            linears = [layer for name in names if isinstance(layer := getattr(parent, name, None), nn.Linear)]
            if len(linears) < len(names):
                continue
            first = linears[0]
            rows = sum(one.out_features for one in linears)
            linear = nn.Linear(first.in_features, rows, bias=False).to(first.weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(torch.cat([one.weight for one in linears]))
            shared = _Shared(linear.requires_grad_(False), [one.out_features for one in linears])
            for index, name in enumerate(names):
                setattr(parent, name, _Part(shared, index, linears[index].bias))


@dataclass(frozen=True)
class Variant:
    """A graph to build.

    Attributes:
        setup: side branches; None: merged.
        packing: how tokens are packed; None: padded.
        fused: query, key and value in one product.
        apart: side branches beside the products of their layers, as in int8.
        attend: in the place of the exporter's.
        one_customer: all rows are one customer's.
        alone: by the graph for one customer, with merged weights as inputs.
        cuda_only: has an operator that no other provider has.
        layout: of customers' numbers.
        sdpa: ONNX Runtime's `sdpa_kernel`, a sum of kernels that attention may have; None: its own choice.
    """

    name: str
    setup: Setup | None = None
    packing: Callable[[], Packing] | None = None
    fused: bool = False
    apart: bool = False
    attend: Callable[..., torch.Tensor] | None = None
    one_customer: bool = False
    alone: bool = False
    cuda_only: bool = False
    layout: type[CustomerRows] = CustomerRows
    sdpa: int | None = None

    def switchable(self, label: str, setup: Setup) -> "Variant":
        """The same with side branches."""
        return replace(self, name=f"{label}, {self.name}", setup=setup)


PADDED = Variant("padded")
PACKED = Variant("padding-free", packing=Packing)
MASKED = Variant("padding-free, mask", packing=MaskPacking)
VARLEN = Variant("padding-free, varlen", packing=VarlenPacking, cuda_only=True)
FLASH_OR_OTHERS = 1 + 2 + 16
"""`sdpa_kernel`: flash, memory-efficient or written out. ONNX Runtime's own choice leaves flash out where query, key
and value come as one and rows are shorter than 513."""
_JOINT = partial(VarlenPacking, joint=True)
JOINT = replace(VARLEN, name="padding-free, varlen, joint", packing=_JOINT, sdpa=FLASH_OR_OTHERS)
JOINT_AS_IS = replace(JOINT, name="padding-free, varlen, joint, as it is", sdpa=None)
MERGED = (
    PADDED,
    replace(PADDED, name="padded, one qkv", fused=True),
    replace(PADDED, name="padded, float mask", attend=attend_float),
    PACKED,
    replace(PACKED, name="padding-free, one qkv", fused=True),
    MASKED,
    VARLEN,
    replace(VARLEN, name="padding-free, varlen, one qkv", fused=True),
    JOINT_AS_IS,
)
SETUPS = (("paper", PAPER), ("qv of 12", WIDE))
BRANCHES = tuple(base.switchable(label, setup) for base in (PADDED, PACKED, VARLEN) for label, setup in SETUPS)
APART = tuple(replace(variant, name=f"{variant.name}, apart", apart=True) for variant in BRANCHES)
WIDE_VARLEN, WIDE_JOINT = (base.switchable("qv of 12", WIDE) for base in (VARLEN, JOINT))
JOINTS = (
    VARLEN,
    JOINT,
    JOINT_AS_IS,
    VARLEN.switchable("paper", PAPER),
    JOINT.switchable("paper", PAPER),
    WIDE_VARLEN,
    WIDE_JOINT,
    replace(WIDE_VARLEN, name=f"{WIDE_VARLEN.name}, by part", layout=RowsByPart),
    replace(WIDE_JOINT, name=f"{WIDE_JOINT.name}, one pass", layout=RowsWithOnes),
)
"""One product for query, key and value, and two more ways of branches."""
ONE = tuple(
    replace(base.switchable(f"one customer of {label}", setup), one_customer=True)
    for base in (PADDED, VARLEN)
    for label, setup in SETUPS
)
"""All rows one customer's, by the graph of many."""
ALONE = tuple(
    replace(base.switchable(f"one customer of {label}, merged weights", setup), one_customer=True, alone=True)
    for base in (PADDED, VARLEN)
    for label, setup in SETUPS
)
GROUPS: dict[str, tuple[Variant, ...]] = {
    "merged": MERGED,
    "switchable": (PADDED, PACKED, VARLEN, *BRANCHES, *APART),
    "joint": JOINTS,
    "one-customer": (PADDED, VARLEN, *ONE, *ALONE),
}
ALL: dict[str, Variant] = {variant.name: variant for group in GROUPS.values() for variant in group}
