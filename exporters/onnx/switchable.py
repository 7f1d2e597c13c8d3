"""A model that serves any customer in any row: coefficients come from a table that is an input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from exporters.onnx.padding_free import Packing
from qrlora_deploy.errors import BasisMismatchError, InputError, argument
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.models.adapter import SideBranch, resolve_layer
from qrlora_deploy.models.head import output_layer
from qrlora_deploy.models.targets import is_conv1d
from qrlora_deploy.runtime.bundle.row_layout import HEAD_TABLE, SLOT, TABLE, TABLE_DTYPES, HeadLayout, TableLayout

MOST_COLUMNS = 4096
"""Columns of the table that are spread over the tokens of a padding-free batch at once. One operator for many
targets is faster than one for each; as wide as a feed-forward layer they take no more memory than that does."""


NO_SLOT = 2**31 - 1
"""What a negative slot becomes: a row that no table has. Gather takes -1 for the last row, which is a customer's."""


class CustomerRows:
    """What the customers of the current batch brought; the wrapper fills it before the model runs.

    Args:
        layout: columns of the coefficient table.
        head: columns of the head table, where customers may have an output layer of their own.

    Attributes:
        packing: of a padding-free model, whose blocks see `[1, tokens, in]`.
        dtype: of the model's activations, and so of the coefficients; a table may have another one.
        parts: how many columns of the table, from left to right, are used together: those of a target, or of
            neighbours that read the same input.
        inputs: what each part was last asked for with, which shows who reads the same.
        weight: `[batch, labels, features]`; bias: `[batch, labels]`; both fp32.
    """

    def __init__(self, layout: TableLayout, head: HeadLayout | None = None) -> None:
        self.layout = layout
        self.head = head
        self.packing: Packing | None = None
        self.dtype = torch.float32
        self.parts = layout.padded_ranks
        self.inputs: dict[int, torch.Tensor] = {}
        self.weight = self.bias = torch.empty(0)
        self._gathered = torch.empty(0)
        self._by_row: tuple[torch.Tensor, ...] = ()
        self._by_token: dict[int, torch.Tensor] = {}
        self._made: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

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
        """Gather the rows: `coefficient_table [slots, width]`, `head_table`, `slot [batch]`.

        The guard is in the graph, two operators in a run, for clients that do not use this project's sessions.
        """
        slot = torch.where(inputs[SLOT] < 0, NO_SLOT, inputs[SLOT])
        self._gathered = inputs[TABLE].index_select(0, slot).to(self.dtype)
        self._by_row = torch.split(self._gathered.unsqueeze(1), list(self.parts), dim=2)
        self._by_token.clear()
        self._made.clear()
        if self.head is not None:
            rows = inputs[HEAD_TABLE].index_select(0, slot)
            weights = self.head.labels * self.head.features
            self.weight = rows[:, :weights].unflatten(1, (self.head.labels, self.head.features))
            self.bias = rows[:, weights:]

    def coefficients(self, part: int, x: torch.Tensor, name: str) -> torch.Tensor:
        """The coefficients for an input `x`, as they are multiplied with `x @ R`.

        Args:
            part: index into `parts`.
            x: `[batch, length, in]` or `[batch, in]`, or `[1, tokens, in]` within a padding-free model's blocks.
            name: of the layer, for the message.

        Raises:
            InputError: the input has other axes, so that its rows are not those of the batch.
        """
        self.inputs[part] = x
        packing = self.packing
        c = self._by_row[part] if packing is None or not packing.inside else self._tokens_part(part, packing)
        # Checked on a plain run before the export: under it, a comparison of sizes would fix them.
        if not torch.compiler.is_exporting() and (x.dim() not in (2, 3) or x.shape[0] != c.shape[0]):
            raise InputError(
                f"{name} takes an input of shape {list(x.shape)} for a batch of {c.shape[0]} rows, not "
                f"[batch, length, in], so its rows cannot have customers of their own; make a basis without it "
                f"({argument('targets')} of factorize), or export a merged bundle"
            )
        return c.squeeze(1) if x.dim() == 2 else c

    def once(self, maker: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`maker(x)`, computed once in a run for all layers that read this very `x`."""
        found = self._made.get(maker)
        if found is None or found[0] is not x:
            found = self._made[maker] = x, maker(x)
        return found[1]

    def _tokens_part(self, part: int, packing: Packing) -> torch.Tensor:
        """`[1, tokens, columns]`, a part by the customer of each token."""
        if part not in self._by_token:
            first, last = next(run for run in _runs(self.parts) if part in range(*run))
            start, columns = sum(self.parts[:first]), list(self.parts[first:last])
            gathered = packing.by_token(self._gathered[:, start : start + sum(columns)])
            self._by_token |= dict(zip(range(first, last), torch.split(gathered, columns, dim=2), strict=True))
        return self._by_token[part]


def _runs(parts: Sequence[int]) -> list[tuple[int, int]]:
    """First and last + 1 of neighbours that have up to `MOST_COLUMNS` columns together; a wider part is alone."""
    runs: list[tuple[int, int]] = []
    columns = 0
    for index, part in enumerate(parts):
        columns += part
        if not runs or columns > MOST_COLUMNS:
            runs.append((index, index))
            columns = part
        runs[-1] = (runs[-1][0], index + 1)
    return runs


class TableBranch(SideBranch):
    """`y = base(x) + Q (c * (R x))` with a `c` for each row of the batch.

    Q and R are constants of the graph, padded with zeros to `padded_rank`; they are kept in the
    orientation of the products, so that the graph holds no Transpose.

    Args:
        base: the layer, an `nn.Linear` or GPT-2's `Conv1D`.
        target: its factors.
        index: which of the batch's coefficients are its own, of as many parts as there are targets.
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
            InputError: as `CustomerRows.coefficients`.
        """
        c = self.rows.coefficients(self.index, x, self.name)
        return self.base(x) + ((x @ self.r) * c) @ self.q


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
    model: Any, basis: Basis, head_labels: int = 0, table_dtype: str = "fp32", of_tokens: bool = False
) -> CustomerRows:
    """Put a `TableBranch` beside every target of `basis`, in place.

    Args:
        model: of a task, in fp32.
        basis: the factors.
        head_labels: most labels that a customer's own output layer may have; 0: all use the model's.
        table_dtype: of the coefficient table, "fp32" or "fp16".
        of_tokens: whether the model answers every token, and not the text as a whole.

    Returns:
        The holder that must be filled before the model runs.

    Raises:
        InputError: a layer is missing or is not a linear layer, or the basis adapts the output
            layer. BasisMismatchError: a shape differs. The model is not changed then.
    """
    head = plan_head(model, basis, head_labels)
    rows = CustomerRows(TableLayout(list(basis.ranks.values()), table_dtype), head)
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
