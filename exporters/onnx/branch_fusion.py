"""Side branches inside the products of their layers, and one for all layers that read the same input.

`x W + (c * (x R)) Q` is one product, `[x, c * (x R)] [W; Q]`: no sum behind it, which would be a pass over the
activations and a launch. Query, key and value read the same `x`. Where several of them are targets, `R_1, R_2, ...` are
one product too, their coefficients lie side by side in the table, and `[x, c_1 * (x R_1), c_2 * (x R_2)]` is made
once for them. The weight of each then has zeros in the place of the others' `Q`: `rank * out` of a branch's
`rank * (in + out)` multiplications for each neighbour, which is less than what they save.

So a block with any number of targets among the three has three operators more than without, where a branch by itself
has four or five. A GPU feels operators and passes; a CPU feels multiplications, and int8 gives the base and the
factors scales of their own. There branches stay apart.
"""

from itertools import groupby
from typing import Any

import torch
from torch import nn

from exporters.onnx.customer_rows import CustomerRows
from exporters.onnx.switchable import TableBranch
from qrlora_deploy.models.targets import is_conv1d


class _ConcatenatedInput(nn.Module):
    """`x [..., in]` to `[x, c_1 * (x R_1), ...] [..., in + ranks]`, for neighbours that read the same `x`."""

    r: torch.Tensor

    def __init__(self, branches: list[TableBranch], part: int) -> None:
        super().__init__()
        self.name, self.rows, self.part = branches[0].name, branches[0].rows, part
        self.register_buffer("r", torch.cat([branch.r for branch in branches], 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.rows.coefficients(self.part, x, self.name)
        return torch.cat([x, (x @ self.r) * c], -1)


class FusedBranch(nn.Module):
    """`y = [x, c * (x R)] [W; Q] + b`, the same as `TableBranch` to rounding.

    Args:
        branch: what it takes the place of.
        wide: makes the input.
        before: ranks of the neighbours that come before it.
    """

    weight: torch.Tensor

    def __init__(self, branch: TableBranch, wide: _ConcatenatedInput, before: int) -> None:
        super().__init__()
        self.wide, self.name = wide, branch.name
        self.width = branch.base.get_parameter("weight").shape[0 if is_conv1d(branch.base) else 1]
        weight = branch.base.get_parameter("weight").detach()
        rank, ranks = len(branch.q), wide.r.shape[1]
        factor = nn.functional.pad(branch.q, (0, 0, before, ranks - before - rank))
        # In the orientation of the product, so that the graph holds no Transpose.
        joined = torch.cat([weight if is_conv1d(branch.base) else weight.T, factor])
        self.register_buffer("weight", joined, persistent=False)
        self.bias: torch.Tensor | None = getattr(branch.base, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, length, in]`, `[batch, in]` or `[1, tokens, in]` to the same with `out`.

        Raises:
            InputError: as `CustomerRows.coefficients`.
        """
        merged = self.wide.rows.merged.get(self.name)
        y = self.wide.rows.once(self.wide, x) @ self.weight if merged is None else x @ merged
        return y if self.bias is None else y + self.bias

    def merge(self, c: torch.Tensor) -> torch.Tensor:
        """`[in, out]`, for the customer whose coefficients `c [1, width]` are."""
        c = c.split(list(self.wide.rows.parts), 1)[self.wide.part]
        return torch.addmm(self.weight[: self.width], self.wide.r * c, self.weight[self.width :])


def fuses(precision: str, provider: str) -> bool:
    """Whether branches are fused in a graph of this precision, made for this provider."""
    return provider != "cpu" or precision in ("fp16", "bf16")


def fuse_branches(model: Any, rows: CustomerRows) -> None:
    """Replace every `TableBranch` of `model` by a `FusedBranch`, in place; the table stays what it is.

    Call it after a run, which tells what reads the same input, and after biases were folded.
    """
    found = ((path, module) for path, module in model.named_modules() if isinstance(module, TableBranch))
    branches = sorted(found, key=lambda item: item[1].index)
    parts = []
    # A layer that the model does not run has read nothing, and no neighbour.
    for part, (_, group) in enumerate(groupby(branches, lambda item: id(rows.inputs.get(item[1].index, item[1])))):
        neighbours = list(group)
        wide = _ConcatenatedInput([branch for _, branch in neighbours], part)
        before = 0
        for path, branch in neighbours:
            model.set_submodule(path, FusedBranch(branch, wide, before))
            before += len(branch.q)
        parts.append(before)
    rows.parts = tuple(parts)
    rows.inputs.clear()
