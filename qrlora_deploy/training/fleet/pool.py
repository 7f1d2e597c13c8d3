"""The rows of the active customers on the device: token ids and hidden states, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from qrlora_deploy.errors import InputError
from qrlora_deploy.training.upper import Layout, packed_layout

IDS = "input_ids"


@dataclass(frozen=True)
class PackedRows:
    """Some rows without padding.

    Attributes:
        hidden: `[tokens, width]`, one row after another.
        layout: where the tokens are.
        token_rows: `[tokens]` int64, the row of each.
    """

    hidden: torch.Tensor
    layout: Layout
    token_rows: torch.Tensor


class RowPool:
    """Tokens of the rows of up to `slots` customers, one after another; room is used again.

    Customers are written behind each other. At the end the living ones are moved together, and
    where that is not enough the pool grows.

    Args:
        slots: how many customers there may be at once.
        pad: `{name: id of padding}` of each input of the model that has one value a token.
        left: whether padding is on the left.
        device: where batches are made.
        limit_bytes: the hidden states take at most this.
    """

    def __init__(self, slots: int, pad: dict[str, int], left: bool, device: torch.device, limit_bytes: int) -> None:
        self.pad, self.left, self.device, self.limit_bytes = pad, left, device, limit_bytes
        self.tokens = {name: torch.zeros(0, dtype=torch.int32, device=device) for name in pad}
        self.hidden: torch.Tensor | None = None
        self.begin = np.zeros(slots, dtype=np.int64)
        self.size = np.zeros(slots, dtype=np.int64)
        self.offsets = np.zeros((slots, 0), dtype=np.int64)
        self.lengths = np.zeros((slots, 0), dtype=np.int64)
        self.end = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the hidden states, free room included."""
        return 0 if self.hidden is None else self.hidden.numel() * self.hidden.element_size()

    def has_room(self, tokens: int, bytes_per_token: int) -> bool:
        """Whether so many more tokens stay within the limit."""
        return (int(self.size.sum()) + tokens) * bytes_per_token <= self.limit_bytes

    def add(self, slot: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write the tokens of a customer's rows; the hidden states follow by `fill`.

        Raises:
            InputError: a row has no token.
        """
        lengths = np.array([len(row[IDS]) for row in rows], dtype=np.int64)
        if not lengths.all():
            raise InputError(f"row {int(np.flatnonzero(lengths == 0)[0]) + 1} has no text that the tokenizer knows")
        self._reserve(int(lengths.sum()))
        self.offsets, self.lengths = (_widened(table, len(rows)) for table in (self.offsets, self.lengths))
        self.lengths[slot, : len(rows)] = lengths
        self.offsets[slot, : len(rows)] = lengths.cumsum() - lengths
        self.begin[slot], self.size[slot] = self.end, lengths.sum()
        self.end += int(lengths.sum())
        for name, stored in self.tokens.items():
            flat = np.concatenate([np.asarray(row[name], dtype=np.int32) for row in rows])
            stored[self.begin[slot] : self.end] = torch.from_numpy(flat).to(self.device)

    def remove(self, slot: int) -> None:
        """Free the room of a customer."""
        self.size[slot] = 0

    def fill(self, starts: torch.Tensor, lengths: torch.Tensor, hidden: torch.Tensor) -> None:
        """Write the hidden states of some rows.

        Args:
            starts: `[rows]`, as `pad_rows` took them.
            lengths: `[rows]`.
            hidden: `[rows, length, width]`.
        """
        if self.hidden is None:
            capacity = len(next(iter(self.tokens.values())))
            # Zeros: what padding reads is multiplied by a weight of zero and must be a number.
            self.hidden = torch.zeros(capacity, hidden.shape[-1], dtype=hidden.dtype, device=self.device)
        where, mask = self._where(starts, lengths, hidden.shape[1])
        self.hidden.index_copy_(0, where[mask], hidden[mask])

    def starts(self, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Where some rows begin in the pool; valid until the next `add`."""
        return self.begin[slots] + self.offsets[slots, rows]

    def pad_rows(self, starts: torch.Tensor, lengths: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """Some rows padded to `length`, the tokens of the longest one, as the model takes them.

        Args:
            starts: `[rows]` int64 on the device, from `starts`.
            lengths: `[rows]` int64 on the device.
            length: tokens.
        """
        where, mask = self._where(starts, lengths, length)
        batch = {name: torch.where(mask, stored[where].long(), self.pad[name]) for name, stored in self.tokens.items()}
        return batch | {"attention_mask": mask.long()}

    def padded_hidden(self, starts: torch.Tensor, lengths: torch.Tensor, length: int) -> torch.Tensor:
        """Hidden states `[rows, length, width]` of the same; where there is padding they mean nothing."""
        return (
            self._filled()
            .index_select(0, self._where(starts, lengths, length)[0].flatten())
            .unflatten(0, (len(starts), length))
        )

    def packed_hidden(self, starts: np.ndarray, lengths: np.ndarray) -> PackedRows:
        """Some rows one after another.

        Args:
            starts: `[rows]` int64, from `starts`.
            lengths: `[rows]` int64, which ascend.
        """
        token_rows = np.repeat(np.arange(len(lengths)), lengths)
        before = lengths.cumsum() - lengths
        where = (starts - before)[token_rows] + np.arange(len(token_rows))
        # Built on the host, which knows every size: on a GPU each would be waited for.
        layout = _on_device(packed_layout(torch.from_numpy(lengths)), self.device)
        hidden = self._filled().index_select(0, to_device(where, self.device))
        return PackedRows(hidden, layout, to_device(token_rows, self.device))

    def _filled(self) -> torch.Tensor:
        if self.hidden is None:
            raise RuntimeError("hidden states are read before the trunk ran")
        return self.hidden

    def _where(self, starts: torch.Tensor, lengths: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        column = torch.arange(length, device=self.device).unsqueeze(0)
        token = column - (length - lengths.unsqueeze(1)) if self.left else column
        mask = (token >= 0) & (token < lengths.unsqueeze(1))
        return torch.where(mask, starts.unsqueeze(1) + token, 0), mask

    def _reserve(self, count: int) -> None:
        capacity = len(next(iter(self.tokens.values())))
        if self.end + count <= capacity:
            return
        living = np.flatnonzero(self.size)
        living = living[np.argsort(self.begin[living], kind="stable")]
        needed = int(self.size.sum()) + count
        # Half as much again, so that moving is rare.
        capacity = max(capacity, needed + needed // 2)
        ranges = [np.arange(self.begin[slot], self.begin[slot] + self.size[slot]) for slot in living]
        kept = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *ranges])).to(self.device)
        self.tokens = {name: _moved(stored, kept, capacity) for name, stored in self.tokens.items()}
        if self.hidden is not None:
            self.hidden = _moved(self.hidden, kept, capacity)
        self.begin[living] = np.cumsum(self.size[living]) - self.size[living]
        self.end = len(kept)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on the device; nothing is waited for."""
    return _send(torch.from_numpy(array), device)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _on_device(value: Any, device: torch.device) -> Any:
    """A record with all tensors in it, and in the records that it holds, on the device."""
    if isinstance(value, torch.Tensor):
        return _send(value, device)
    if isinstance(value, tuple):
        return tuple(_on_device(item, device) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{item.name: _on_device(getattr(value, item.name), device) for item in fields(value)})


def _moved(stored: torch.Tensor, kept: torch.Tensor, capacity: int) -> torch.Tensor:
    moved = stored.new_zeros(capacity, *stored.shape[1:]) if capacity > len(stored) else stored
    # What is read was copied before it is written: the two may overlap.
    moved[: len(kept)] = stored.index_select(0, kept)
    return moved


def _widened(table: np.ndarray, columns: int) -> np.ndarray:
    missing = columns - table.shape[1]
    return np.pad(table, ((0, 0), (0, missing))) if missing > 0 else table
