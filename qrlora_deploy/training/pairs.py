"""Rows of training data whose two texts are read each by itself."""

from collections.abc import Callable
from typing import Any

FIRST, SECOND = "first", "second"

Row = dict[str, Any]


def texts_of(row: Row) -> list[Row]:
    """What a model reads of a row: one text, or the two of a pair."""
    return [row[FIRST], row[SECOND]] if FIRST in row else [row]


def collate_pairs(pad: Callable[[list[Row]], Any]) -> Callable[[list[Row]], dict[str, Any]]:
    """A batch `[2 n, length]` of n pairs, all first texts and then all second ones, with labels `[n]`.

    Args:
        pad: makes a batch of token ids of some texts.
    """

    def collate(rows: list[Row]) -> dict[str, Any]:
        import torch

        texts = [row[part] for part in (FIRST, SECOND) for row in rows]
        return {**pad(texts), "labels": torch.tensor([row["labels"] for row in rows])}

    return collate
