"""What the customers of a batch bring to the layers of a model: rows of tables, or rows of their own."""

from collections.abc import Sequence

import torch
from torch import nn

from exporters.onnx.padding_free import Packing
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.runtime.bundle.row_layout import (
    COEFFICIENTS,
    HEAD,
    HEAD_TABLE,
    SLOT,
    TABLE,
    TABLE_DTYPES,
    HeadLayout,
    TableLayout,
)

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
        merged: weights `[in, out]` with one customer in them, by target; empty: the rows' customers are beside them.
        weight: `[batch, labels, features]`; bias: `[batch, labels]`; both fp32.
    """

    def __init__(self, layout: TableLayout, head: HeadLayout | None = None) -> None:
        self.layout = layout
        self.head = head
        self.packing: Packing | None = None
        self.dtype = torch.float32
        self.parts = layout.padded_ranks
        self.inputs: dict[int, torch.Tensor] = {}
        self.merged: dict[str, torch.Tensor] = {}
        self.weight = self.bias = torch.empty(0)
        self._gathered = torch.empty(0)
        self._by_row: tuple[torch.Tensor, ...] = ()
        self._by_token: dict[int, torch.Tensor] = {}
        self._made: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def examples(self, batch: int) -> dict[str, tuple[torch.Tensor, tuple[str | int, ...]]]:
        """Example tensors and axes by the name of the input, in the order of the graph's inputs."""
        # More slots than rows, so that the exporter cannot take the two for one axis.
        tables = self._numbers(TABLE, HEAD_TABLE, batch + 2, "slots")
        return {**tables, SLOT: (torch.arange(batch), ("batch",))}

    def _numbers(
        self, name: str, head_name: str, count: int, axis: str
    ) -> dict[str, tuple[torch.Tensor, tuple[str | int, ...]]]:
        """Examples of `count` customers' numbers: their coefficients, and their heads where they may have one."""
        dtype = torch.float16 if self.layout.dtype == TABLE_DTYPES["fp16"] else torch.float32
        found: dict[str, tuple[torch.Tensor, tuple[str | int, ...]]] = {
            name: (torch.full((count, self.layout.width), 0.01, dtype=dtype), (axis, self.layout.width))
        }
        if self.head is not None:
            found[head_name] = (torch.full((count, self.head.width), 0.01), (axis, self.head.width))
        return found

    def by_row(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Coefficients `[batch, width]` and heads `[batch, head width]`: rows of the tables, by `slot [batch]`.

        The guard is in the graph, two operators in a run, for clients that do not use this project's sessions.
        """
        slot = inputs[SLOT]
        if self.packing is None or not self.packing.flat:
            slot = torch.where(slot < 0, NO_SLOT, slot)
        heads = inputs[HEAD_TABLE].index_select(0, slot) if self.head is not None else None
        return inputs[TABLE].index_select(0, slot), heads

    def fill(self, inputs: dict[str, torch.Tensor]) -> None:
        """Take what the customers of a run brought, by the names of `examples`."""
        coefficients, rows = self.by_row(inputs)
        self._gathered = coefficients.to(self.dtype)
        self._by_row = torch.split(self._gathered.unsqueeze(1), list(self.parts), dim=2)
        self._by_token.clear()
        self._made.clear()
        self._take_heads(rows)

    def fill_merged(self, merged: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> None:
        """Take the merged weights of the one customer of a run, and the heads of its rows where there may be some."""
        self.merged = merged
        if self.head is not None:
            self._take_heads(inputs[HEAD_TABLE].index_select(0, inputs[SLOT]))

    def _take_heads(self, rows: torch.Tensor | None) -> None:
        if self.head is not None and rows is not None:
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


class BroughtRows(CustomerRows):
    """The same where each row of a batch brings its customer's numbers: no table, and no row that is none."""

    def examples(self, batch: int) -> dict[str, tuple[torch.Tensor, tuple[str | int, ...]]]:
        """As `CustomerRows.examples`."""
        return self._numbers(COEFFICIENTS, HEAD, batch, "batch")

    def by_row(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """They are there: `coefficients [batch, width]`, `head [batch, head width]`."""
        return inputs[COEFFICIENTS], inputs.get(HEAD)


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
