"""Batches of rows that are written on."""

from collections.abc import Sequence
from typing import Any

from qrlora_deploy.tasks.answer_rows import Row
from qrlora_deploy.tasks.base import IGNORED

PLACES = "trunk_places"
"""Of rows whose tokens have hidden states in a cache: where each one's are."""


class AnswerCollator:
    """Makes batches of rows of `answer_rows`, padded on the right, whatever side the tokenizer pads on.

    Args:
        padding: a token; nothing looks at it.
        room: tokens that short rows may share one row of the batch up to, `position_ids` beginning anew with each, by
            which transformers lets each see itself alone; None: none do.
    """

    def __init__(self, padding: int, room: int | None = None) -> None:
        self.padding = padding
        self.room = room

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """`input_ids`, `labels`, `PLACES` where rows have them, and `attention_mask` or `position_ids`, each
        `[n, longest]` int64."""
        import torch

        sizes = [len(row["input_ids"]) for row in rows]
        groups = [[number] for number in range(len(rows))] if self.room is None else packed_groups(sizes, self.room)
        fillers = {"input_ids": self.padding, "labels": IGNORED, PLACES: 0}
        columns: dict[str, list[list[int]]] = {name: [] for name in fillers if name in rows[0]}
        lengths = [[sizes[number] for number in group] for group in groups]
        longest = max(map(sum, lengths))
        for group in groups:
            for name in columns:
                joined = [value for number in group for value in _sealed(name, rows[number][name])]
                columns[name].append(joined + [fillers[name]] * (longest - len(joined)))
        batch = {name: torch.tensor(values) for name, values in columns.items()}
        if self.room is not None:
            places = [[place for length in (*own, longest - sum(own)) for place in range(length)] for own in lengths]
            return batch | {"position_ids": torch.tensor(places)}
        masks = [[1] * sum(own) + [0] * (longest - sum(own)) for own in lengths]
        return batch | {"attention_mask": torch.tensor(masks)}


def _sealed(name: str, values: Sequence[int]) -> Sequence[int]:
    """A row's own; nothing before it foretells its first token."""
    return [IGNORED, *values[1:]] if name == "labels" else values


def packed_groups(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which rows share one: the longest first, each into the first one that has room for it.

    Args:
        lengths: of the rows, in tokens.
        room: of each shared row; a longer one is by itself.
    """
    left: list[int] = []
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((place for place, free in enumerate(left) if free >= lengths[number]), len(left))
        if place == len(left):
            left.append(room)
            groups.append([])
        left[place] -= lengths[number]
        groups[place].append(number)
    return groups
