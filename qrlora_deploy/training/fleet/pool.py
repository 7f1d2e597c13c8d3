"""The rows of the active customers on the device: token ids and hidden states, without padding."""

from dataclasses import dataclass

import numpy as np
import torch

from qrlora_deploy.training.fleet.shipping import ship
from qrlora_deploy.training.fleet.tokens import TokenRows
from qrlora_deploy.training.trunk.padding_free import Layout, packed_layout


@dataclass(frozen=True)
class PackedRows:
    """Some rows without padding.

    Attributes:
        where: `[tokens]` int64, place in the pool of each token, one row after another.
        token_rows: `[tokens]` int64, the row of each.
        layout: of these tokens.
    """

    where: torch.Tensor
    token_rows: torch.Tensor
    layout: Layout


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

    def add(self, slot: int, rows: TokenRows) -> None:
        """Write the tokens of a customer's rows; the hidden states follow by `fill`."""
        count, lengths = int(rows.lengths.sum()), rows.lengths
        self.reserve(count)
        self.offsets, self.lengths = (_widened(table, len(lengths)) for table in (self.offsets, self.lengths))
        self.lengths[slot, : len(lengths)] = lengths
        self.offsets[slot, : len(lengths)] = lengths.cumsum() - lengths
        self.begin[slot], self.size[slot] = self.end, count
        self.end += count
        for name, stored in self.tokens.items():
            stored[self.begin[slot] : self.end] = ship(torch.from_numpy(rows.values[name]), self.device)

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
            # Zeros: what padding reads is multiplied by a weight of zero and must be a number. Padding is
            # written to one place more: to leave it out, its size would be waited for.
            self.hidden = torch.zeros(capacity + 1, hidden.shape[-1], dtype=hidden.dtype, device=self.device)
        where, mask = self._where(starts, lengths, hidden.shape[1])
        self.hidden.index_copy_(0, where.masked_fill(~mask, len(self.hidden) - 1).flatten(), hidden.flatten(0, 1))

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

    def pack(self, starts: np.ndarray, lengths: np.ndarray) -> PackedRows:
        """Where some rows are, one after another; made on the host, which knows every size.

        Args:
            starts: `[rows]` int64, from `starts`.
            lengths: `[rows]` int64, which ascend.
        """
        token_rows = np.repeat(np.arange(len(lengths)), lengths)
        before = lengths.cumsum() - lengths
        where = (starts - before)[token_rows] + np.arange(len(token_rows))
        layout = packed_layout(torch.from_numpy(lengths))
        return PackedRows(torch.from_numpy(where), torch.from_numpy(token_rows), layout)

    def packed_hidden(self, rows: PackedRows) -> torch.Tensor:
        """`[tokens, width]`, the hidden states of such rows, whose tensors are on the device."""
        return self._filled().index_select(0, rows.where)

    def _filled(self) -> torch.Tensor:
        if self.hidden is None:
            raise RuntimeError("hidden states are read before the trunk ran")
        return self.hidden

    def _where(self, starts: torch.Tensor, lengths: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        column = torch.arange(length, device=self.device).unsqueeze(0)
        token = column - (length - lengths.unsqueeze(1)) if self.left else column
        mask = (token >= 0) & (token < lengths.unsqueeze(1))
        return torch.where(mask, starts.unsqueeze(1) + token, 0), mask

    def reserve(self, count: int) -> None:
        """Make sure that so many more tokens can be written; rows move, so `starts` change."""
        capacity = len(next(iter(self.tokens.values())))
        if self.end + count <= capacity:
            return
        living = np.flatnonzero(self.size)
        living = living[np.argsort(self.begin[living], kind="stable")]
        needed = int(self.size.sum()) + count
        # Half as much again, so that moving is rare.
        capacity = max(capacity, needed + needed // 2)
        ranges = [np.arange(self.begin[slot], self.begin[slot] + self.size[slot]) for slot in living]
        kept = ship(torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *ranges])), self.device)
        self.tokens = {name: _moved(stored, kept, capacity) for name, stored in self.tokens.items()}
        if self.hidden is not None:
            self.hidden = _moved(self.hidden, kept, capacity + 1)
        self.begin[living] = np.cumsum(self.size[living]) - self.size[living]
        self.end = len(kept)


def _moved(stored: torch.Tensor, kept: torch.Tensor, capacity: int) -> torch.Tensor:
    moved = stored.new_zeros(capacity, *stored.shape[1:]) if capacity > len(stored) else stored
    # What is read was copied before it is written: the two may overlap.
    moved[: len(kept)] = stored.index_select(0, kept)
    return moved


def _widened(table: np.ndarray, columns: int) -> np.ndarray:
    missing = columns - table.shape[1]
    return np.pad(table, ((0, 0), (0, missing))) if missing > 0 else table
