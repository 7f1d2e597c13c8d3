"""A model that serves any customer in any row: coefficients come from a table that is an input, or with each row."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from exporters.onnx.customer_rows import CustomerRows
from qrlora_deploy.errors import BasisMismatchError, InputError, argument
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.models.adapter import SideBranch, resolve_layer
from qrlora_deploy.models.head import output_layer
from qrlora_deploy.models.targets import is_conv1d
from qrlora_deploy.runtime.bundle.row_layout import HeadLayout, TableLayout

SMALLEST_RANGE = 1e-30
"""Of a token's numbers between R and Q where they are scaled: below it they are as good as zero."""


class TableBranch(SideBranch):
    """`y = base(x) + Q (c * (R x))` with a `c` for each row of the batch.

    Q and R are constants of the graph, padded with zeros to `padded_rank`; they are kept in the
    orientation of the products, so that the graph holds no Transpose.

    Args:
        base: the layer, an `nn.Linear` or GPT-2's `Conv1D`.
        target: its factors.
        index: which of the batch's coefficients are its own, of as many parts as there are targets.
        rows: where they are found.

    Attributes:
        by_token: scale what goes into the product with Q to the range of each token, and what comes out back. Where
            that product is in whole numbers, tokens then share a scale and keep their digits.

    Raises:
        BasisMismatchError: the factors do not have the shape of the layer.
    """

    q: torch.Tensor
    r: torch.Tensor

    def __init__(self, base: nn.Module, target: BasisTarget, index: int, rows: CustomerRows) -> None:
        super().__init__()
        weight = base.get_parameter("weight")
        shape = tuple(weight.shape[::-1]) if is_conv1d(base) else tuple(weight.shape)
        expected = (target.q.shape[0], target.r.shape[1])
        if shape != expected:
            raise BasisMismatchError(f"{target.name} is {list(shape)} in the model but {list(expected)} in the basis")
        self.base = base
        self.name = target.name
        self.index = index
        self.rows = rows
        self.by_token = False
        padding = rows.layout.padded_ranks[index] - target.rank
        q = nn.functional.pad(torch.tensor(target.q).T, (0, 0, 0, padding))
        r = nn.functional.pad(torch.tensor(target.r).T, (0, padding))
        self.register_buffer("q", q.to(weight.dtype).contiguous(), persistent=False)
        self.register_buffer("r", r.to(weight.dtype).contiguous(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, length, in]` or `[batch, in]` to the same with `out`; exactly `base(x)` in rows where c is zero.

        Raises:
            InputError: as `CustomerRows.coefficients`.
        """
        merged = self.rows.merged.get(self.name)
        if merged is not None:
            bias = getattr(self.base, "bias", None)
            return x @ merged if bias is None else x @ merged + bias
        c = self.rows.coefficients(self.index, x, self.name)
        return self.base(x) + self._update((x @ self.r) * c)

    def _update(self, h: torch.Tensor) -> torch.Tensor:
        """`h [..., rank]` times Q."""
        return scaled_by_token(h, lambda part: part @ self.q) if self.by_token else h @ self.q

    def merge(self, c: torch.Tensor) -> torch.Tensor:
        """`[in, out]`, for the customer whose coefficients `c [1, width]` are."""
        c = c.split(list(self.rows.parts), 1)[self.index]
        weight = self.base.get_parameter("weight")
        return torch.addmm(weight if is_conv1d(self.base) else weight.T, self.r * c, self.q)


def scaled_by_token(h: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A linear `product` of `h [..., rank]` that is given each token's numbers between -1 and 1; zeros stay zeros."""
    largest = h.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_RANGE)
    return product(h * (1 / largest)) * largest


class HeadBranch(nn.Module):
    """The output layer, its weights by row of the batch.

    Args:
        name: the path of the layer that it takes the place of.
        rows: where the weights are found.
        of_tokens: whether it answers every token, and not the text as a whole.
    """

    def __init__(self, name: str, rows: CustomerRows, of_tokens: bool = False) -> None:
        super().__init__()
        self.name = name
        self.rows = rows
        self.of_tokens = of_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, features]` to `[batch, labels]` fp32, whatever the dtype of `x`; or `[batch, length, ...]` both.

        The rows come from an fp32 table: casting them would cost more than the product does.

        Raises:
            InputError: the input has other axes.
        """
        axes = "[batch, length, features]" if self.of_tokens else "[batch, features]"
        if not torch.compiler.is_exporting() and x.dim() != axes.count(",") + 1:
            raise InputError(
                f"{self.name} takes an input of shape {list(x.shape)}, not {axes}, so customers cannot "
                f"have heads of their own; leave {argument('head_labels')} out"
            )
        if self.of_tokens:
            return torch.matmul(x.float(), self.rows.weight.transpose(1, 2)) + self.rows.bias.unsqueeze(1)
        return torch.matmul(self.rows.weight, x.float().unsqueeze(2)).squeeze(2) + self.rows.bias


def plan_head(model: Any, basis: Basis, head_labels: int) -> HeadLayout | None:
    """Columns of the head table; None where all customers use the model's output layer.

    Args:
        model: of a task.
        basis: the factors.
        head_labels: most labels that a customer's own output layer may have; 0: all use the model's.

    Raises:
        InputError: there is no output layer, or the basis adapts it.
    """
    if not head_labels:
        return None
    path = output_layer(model)
    if path in [resolve_layer(model, target.name)[0] for target in basis.targets]:
        raise InputError(f"the basis adapts the output layer {path}, so {argument('head_labels')} cannot replace it")
    return HeadLayout(head_labels, model.get_submodule(path).in_features)


def make_switchable(
    model: Any,
    basis: Basis,
    head_labels: int = 0,
    table_dtype: str = "fp32",
    of_tokens: bool = False,
    layout: type[CustomerRows] = CustomerRows,
) -> CustomerRows:
    """Put a `TableBranch` beside every target of `basis`, in place.

    Args:
        model: of a task, in fp32.
        basis: the factors.
        head_labels: most labels that a customer's own output layer may have; 0: all use the model's.
        table_dtype: of the coefficient table, "fp32" or "fp16".
        of_tokens: whether the model answers every token, and not the text as a whole.
        layout: how customers' numbers come in.

    Returns:
        The holder that must be filled before the model runs.

    Raises:
        InputError: a layer is missing or is not a linear layer, or the basis adapts the output
            layer. BasisMismatchError: a shape differs. The model is not changed then.
    """
    head = plan_head(model, basis, head_labels)
    rows = layout(TableLayout(list(basis.ranks.values()), table_dtype), head)
    replaced: dict[str, nn.Module] = {}
    for index, target in enumerate(basis.targets):
        path, layer = resolve_layer(model, target.name)
        replaced[path] = TableBranch(layer, target, index, rows)
    if head is not None:
        head_path = output_layer(model)
        replaced[head_path] = HeadBranch(head_path, rows, of_tokens)
    for path, branch in replaced.items():
        model.set_submodule(path, branch)
    return rows
