"""A model that serves any customer in any row: coefficients come from a table that is an input."""

from typing import Any

import torch
from torch import nn

from exporters.onnx.packing import Packing
from qrlora_deploy.adapter import resolve_layer
from qrlora_deploy.basis import Basis, BasisTarget
from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.runtime.layout import HEAD_TABLE, SLOT, TABLE, TABLE_DTYPES, HeadLayout, TableLayout
from qrlora_deploy.targets import is_conv1d
from qrlora_deploy.training.head import output_layer


class CustomerRows:
    """What the customers of the current batch brought; the wrapper fills it before the model runs.

    Args:
        layout: columns of the coefficient table.
        head: columns of the head table, where customers may have an output layer of their own.

    Attributes:
        packing: of a padding-free model, whose blocks see `[1, tokens, in]`.
        dtype: of the model's activations, and so of `coefficients`; a table may have another one.
        coefficients: `[batch, 1, padded rank]` for each target, in the basis's order.
        weight: `[batch, labels, features]`; bias: `[batch, labels]`; both fp32.
    """

    def __init__(self, layout: TableLayout, head: HeadLayout | None = None) -> None:
        self.layout = layout
        self.head = head
        self.packing: Packing | None = None
        self.dtype = torch.float32
        self.coefficients: tuple[torch.Tensor, ...] = ()
        self.weight = self.bias = torch.empty(0)

    def examples(self, batch: int) -> dict[str, tuple[torch.Tensor, tuple[str | int, ...]]]:
        """Example tensors and axes by the name of the input, in the order of the graph's inputs."""
        # More slots than rows, so that the exporter cannot take the two for one axis.
        slots = batch + 2
        widths = {TABLE: self.layout.width} | ({HEAD_TABLE: self.head.width} if self.head else {})
        tables = {name: (torch.full((slots, width), 0.01), ("slots", width)) for name, width in widths.items()}
        if self.layout.dtype == TABLE_DTYPES["fp16"]:
            tables[TABLE] = (tables[TABLE][0].half(), tables[TABLE][1])
        return {**tables, SLOT: (torch.arange(batch), ("batch",))}

    def fill(self, inputs: dict[str, torch.Tensor]) -> None:
        """Gather the rows: `coefficient_table [slots, width]`, `head_table`, `slot [batch]`."""
        gathered = inputs[TABLE].index_select(0, inputs[SLOT]).unsqueeze(1).to(self.dtype)
        self.coefficients = torch.split(gathered, list(self.layout.padded_ranks), dim=2)
        if self.head is not None:
            rows = inputs[HEAD_TABLE].index_select(0, inputs[SLOT])
            weights = self.head.labels * self.head.features
            self.weight = rows[:, :weights].unflatten(1, (self.head.labels, self.head.features))
            self.bias = rows[:, weights:]


class TableBranch(nn.Module):
    """`y = base(x) + Q (c * (R x))` with a `c` for each row of the batch.

    Q and R are constants of the graph, padded with zeros to `padded_rank`; they are kept in the
    orientation of the products, so that the graph holds no Transpose.

    Args:
        base: the layer, an `nn.Linear` or GPT-2's `Conv1D`.
        target: its factors.
        index: which of the batch's coefficients are its own.
        rows: where they are found.

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
        padding = rows.layout.padded_ranks[index] - target.rank
        q = nn.functional.pad(torch.tensor(target.q).T, (0, 0, 0, padding))
        r = nn.functional.pad(torch.tensor(target.r).T, (0, padding))
        self.register_buffer("q", q.to(weight.dtype).contiguous(), persistent=False)
        self.register_buffer("r", r.to(weight.dtype).contiguous(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, length, in]` or `[batch, in]` to the same with `out`; exactly `base(x)` in rows where c is zero.

        Raises:
            InputError: the input has other axes, so that its rows are not those of the batch.
        """
        c = self.rows.coefficients[self.index]
        if self.rows.packing is not None and self.rows.packing.inside:
            c = self.rows.packing.by_token(c)
        # Checked on a plain run before the export: under it, a comparison of sizes would fix them.
        if not torch.compiler.is_exporting() and (x.dim() not in (2, 3) or x.shape[0] != c.shape[0]):
            raise InputError(
                f"{self.name} takes an input of shape {list(x.shape)} for a batch of {c.shape[0]} rows, not "
                f"[batch, length, in], so its rows cannot have customers of their own; make a basis without it "
                f"(factorize --target), or export with --merge"
            )
        if x.dim() == 2:
            c = c.squeeze(1)
        return self.base(x) + ((x @ self.r) * c) @ self.q


class HeadBranch(nn.Module):
    """The output layer, its weights by row of the batch.

    Args:
        name: the path of the layer that it takes the place of.
        rows: where the weights are found.
    """

    def __init__(self, name: str, rows: CustomerRows) -> None:
        super().__init__()
        self.name = name
        self.rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, features]` to `[batch, labels]` fp32, whatever the dtype of `x`.

        The rows come from an fp32 table: casting them would cost more than the product does.

        Raises:
            InputError: the input has other axes.
        """
        if not torch.compiler.is_exporting() and x.dim() != 2:
            raise InputError(
                f"{self.name} takes an input of shape {list(x.shape)}, not [batch, features], so customers cannot "
                f"have heads of their own; leave --head-labels out"
            )
        return torch.matmul(self.rows.weight, x.float().unsqueeze(2)).squeeze(2) + self.rows.bias


def make_switchable(model: Any, basis: Basis, head_labels: int = 0, table_dtype: str = "fp32") -> CustomerRows:
    """Put a `TableBranch` beside every target of `basis`, in place.

    Args:
        model: of a task, in fp32.
        basis: the factors.
        head_labels: most labels that a customer's own output layer may have; 0: all use the model's.
        table_dtype: of the coefficient table, "fp32" or "fp16".

    Returns:
        The holder that must be filled before the model runs.

    Raises:
        InputError: a layer is missing or is not a linear layer, or the basis adapts the output
            layer. BasisMismatchError: a shape differs. The model is not changed then.
    """
    head_path = output_layer(model) if head_labels else ""
    head = HeadLayout(head_labels, model.get_submodule(head_path).in_features) if head_labels else None
    rows = CustomerRows(TableLayout(list(basis.ranks.values()), table_dtype), head)
    replaced: dict[str, nn.Module] = {}
    for index, target in enumerate(basis.targets):
        path, layer = resolve_layer(model, target.name)
        replaced[path] = TableBranch(layer, target, index, rows)
    if head is not None:
        if head_path in replaced:
            raise InputError(f"the basis adapts the output layer {head_path}, so --head-labels cannot replace it")
        replaced[head_path] = HeadBranch(head_path, rows)
    for path, branch in replaced.items():
        model.set_submodule(path, branch)
    return rows
