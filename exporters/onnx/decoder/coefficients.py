"""The coefficients of each row for all branches: gathered from the table once and taken apart, before all else."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx.helper import np_dtype_to_tensor_dtype

from exporters.onnx.decoder.branches import Branch, Branches
from exporters.onnx.decoder.nodes import Nodes
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE, TABLE_DTYPES

NO_SLOT = 2**31 - 1
"""What a negative slot becomes: a row that no table has. Gather takes -1 for the last row, which is a customer's."""

MOST_OUTPUTS = 32
"""Of a Split on a GPU. With more of them, or with sizes that differ, ONNX Runtime copies four lists from the host for
each token, which took 23 us of a token of Llama-3.2-1B's shape; with equal sizes it is one kernel of 1.4 us."""


@dataclass(frozen=True)
class Part:
    """What a branch multiplies with.

    Attributes:
        name: `[batch, 1, kept + width]` in the graph.
        kept: ones before the coefficients.
    """

    name: str
    branch: Branch
    kept: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.kept + self.branch.width


def add_coefficients(
    nodes: Nodes, branches: Branches, parts: Sequence[Part], table_dtype: str, one_customer: bool = False
) -> None:
    """Put the nodes that make `parts` before all others.

    Args:
        nodes: the graph, whole.
        branches: where the coefficients stand in a row of the table.
        parts: of every branch.
        table_dtype: "fp32" or "fp16".
        one_customer: all rows have the one row of a table that is zero where it is not given.
    """
    inner, nodes.nodes = nodes.nodes, []
    nodes.start_at = len(inner)
    found = _one_row(nodes, branches.width, table_dtype) if one_customer else _rows(nodes)
    rows = _prepared(nodes, found, table_dtype, any(part.kept for part in parts))
    for number, group in enumerate(_groups(parts)):
        columns = np.concatenate([branches.columns(part.branch, part.kept) for part in group])
        taken = rows
        if not np.array_equal(columns, np.arange(branches.width)):
            taken = nodes.add("Gather", [rows, nodes.constant(f"columns_{number}", columns, np.int64)], axis=2)
        sizes = nodes.constant(f"branch_sizes_{number}", [part.width for part in group], np.int64)
        nodes.add_many("Split", [taken, sizes], [part.name for part in group], axis=2)
    nodes.nodes += inner


def _one_row(nodes: Nodes, width: int, table_dtype: str) -> str:
    """The table as an initializer that may be given."""
    nodes.constant(TABLE, np.zeros([1, width]), TABLE_DTYPES[table_dtype])
    return TABLE


def _rows(nodes: Nodes) -> str:
    """What each row of the batch has of the table."""
    negative = nodes.add("Less", [SLOT, nodes.constant("zero", 0, np.int64)])
    slot = nodes.add("Where", [negative, nodes.constant("no_slot", NO_SLOT, np.int64), SLOT])
    return nodes.add("Gather", [TABLE, slot])


def _prepared(nodes: Nodes, rows: str, table_dtype: str, with_ones: bool) -> str:
    """`[batch, 1, width]` in the graph's dtype; a column of ones may stand behind the table's."""
    dtype = TABLE_DTYPES[table_dtype]
    if with_ones:
        one = nodes.constant("kept", 1, dtype)
        rows = nodes.add("Pad", [rows, nodes.constant("a_column", [0, 0, 0, 1], np.int64), one])
    if np_dtype_to_tensor_dtype(dtype) != nodes.kind:
        rows = nodes.add("Cast", [rows], to=nodes.kind)
    return nodes.add("Unsqueeze", [rows, nodes.constant("tokens_axis", [1], np.int64)])


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts that one Split takes apart: those that are level by their width, a few at a time; and the others."""
    by_width: dict[int, list[Part]] = {}
    for part in parts:
        if part.branch.level:
            by_width.setdefault(part.width, []).append(part)
    found = [
        level[first : first + MOST_OUTPUTS]
        for level in by_width.values()
        for first in range(0, len(level), MOST_OUTPUTS)
    ]
    uneven = [part for part in parts if not part.branch.level]
    return [*found, uneven] if uneven else found
