"""Two more graphs of a switchable bundle, by which a session keeps merged weights of one customer.

`merge.onnx` makes the weights of a customer from his row of the table: `W + R diag(c) Q` of every target. `alone.onnx`
is the model without side branches, and the weights of the targets are inputs of it. So one session answers for any
customer at the cost of a merged graph, where all rows of a batch are his.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from exporters.onnx.customer_rows import CustomerRows
from exporters.onnx.padding_free import Packing
from exporters.onnx.tracing import Example
from qrlora_deploy.runtime.bundle.row_layout import HEAD_TABLE, MERGED, SLOT, TABLE


class MergedRows:
    """What takes the place of `CustomerRows` in a trace of the model as one customer.

    Args:
        rows: of the model.
        branches: the side branches, in the order of the targets; each can `merge`.
    """

    def __init__(self, rows: CustomerRows, branches: Sequence[Any]) -> None:
        self.rows, self.branches = rows, branches
        self.packing: Packing | None = rows.packing

    def examples(self, batch: int) -> dict[str, Example]:
        """The merged weights, by the names of their targets, and the heads of rows where there are some."""
        c = torch.zeros(1, self.rows.layout.width, dtype=self.rows.dtype)
        weights: dict[str, Example] = {}
        for branch in self.branches:
            weight = branch.merge(c).detach()
            weights[MERGED + branch.name] = weight, tuple(weight.shape)
        tables = self.rows.examples(batch) if self.rows.head is not None else {}
        return weights | {name: tables[name] for name in (HEAD_TABLE, SLOT) if name in tables}

    def fill(self, inputs: dict[str, torch.Tensor]) -> None:
        """Take the inputs of the run that begins."""
        merged = {branch.name: inputs[MERGED + branch.name] for branch in self.branches}
        self.rows.fill_merged(merged, inputs)


class Merging(nn.Module):
    """Makes the merged weights of the customer in row `slot [1]` of the table.

    Args:
        model: whose parameters they are of; it makes their names those of the other graphs.
    """

    def __init__(self, model: nn.Module, rows: MergedRows) -> None:
        super().__init__()
        self.model = model
        self._rows = rows

    @property
    def outputs(self) -> list[str]:
        """What they are called, in order."""
        return [MERGED + branch.name for branch in self._rows.branches]

    def examples(self) -> dict[str, Example]:
        """Of the inputs."""
        table = self._rows.rows.examples(1)[TABLE]
        return {TABLE: table, SLOT: (torch.zeros(1, dtype=torch.int64), (1,))}

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`table [slots, width]`, `slot [1]` to `[in, out]` of each target."""
        table, slot = inputs
        c = table.index_select(0, slot).to(self._rows.rows.dtype)
        return tuple(branch.merge(c) for branch in self._rows.branches)


def merged_rows(model: nn.Module, rows: CustomerRows) -> MergedRows:
    """Of a model with side branches, fused or not."""
    found = {module.name: module for module in model.modules() if hasattr(module, "merge")}
    return MergedRows(rows, list(found.values()))
