"""What a trunk answers to the rows of a data set, computed once and kept without padding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qrlora_deploy.errors import InputError
from qrlora_deploy.training.trunk.memory import Room, allocate
from qrlora_deploy.training.trunk.split import SplitModel

HOST = Room()


@dataclass(frozen=True)
class TrunkCache:
    """What a trunk answers to every row of a data set, without padding.

    Attributes:
        hidden: `[tokens, width]`, the rows one after another; on the device, in (pinned) host
            memory or in a memory-mapped file.
        offsets: `[rows + 1]` int64, where each row begins; beside `hidden`.
        device: where batches go.
        place: "device", "host" or "disk".
    """

    hidden: torch.Tensor
    offsets: torch.Tensor
    device: torch.device
    place: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def size_bytes(self) -> int:
        """Bytes of the hidden states."""
        return self.hidden.numel() * self.hidden.element_size()

    def lengths(self, rows: torch.Tensor) -> torch.Tensor:
        """Tokens of each of some rows `[n]`, beside `hidden`."""
        rows = rows.to(self.offsets.device)
        return self.offsets[rows + 1] - self.offsets[rows]

    def packed(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of some rows one after another.

        Args:
            rows: `[n]` int64 row numbers, on any device.

        Returns:
            hidden `[tokens of these rows, width]` and their lengths `[n]`, both on `device`.
        """
        where, lengths = _places(self.offsets, rows.to(self.offsets.device))
        hidden = self.hidden.index_select(0, where)
        return hidden.to(self.device, non_blocking=True), lengths.to(self.device, non_blocking=True)

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """`[n, length, width]` on `device`: the tokens at `places [n, length]` int64, in the order of the rows."""
        hidden = self.hidden.index_select(0, places.to(self.hidden.device).flatten())
        return hidden.to(self.device, non_blocking=True).unflatten(0, places.shape)

    def rectangle(self, rows: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows on the right padded to one length, without a look at their lengths on the CPU.

        Args:
            rows: `[n]` int64 row numbers.
            length: at least that of the longest.

        Returns:
            hidden `[n * length, width]`, with a row's last token again where it is padded, and the
            lengths `[n]`, both on `device`.
        """
        rows = rows.to(self.offsets.device)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        steps = torch.arange(length, device=rows.device)
        where = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
        hidden = self.hidden.index_select(0, where.flatten())
        return hidden.to(self.device, non_blocking=True), lengths.to(self.device, non_blocking=True)

    def padded(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The rows as `SplitModel.upper` takes them.

        Args:
            rows: `[n]` int64 row numbers.
            mask: `[n, length]`, the attention mask of the batch; row i holds as many ones as row
                `rows[i]` of the cache has tokens. Padding may be on either side.

        Returns:
            `[n, length, width]` on `device`, zero where the mask is 0.
        """
        hidden, _ = self.packed(rows)
        mask = mask.to(self.device).bool()
        padded = hidden.new_zeros(*mask.shape, hidden.shape[1])
        padded[mask] = hidden
        return padded


def fill_cache(
    split: SplitModel,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    room: Room = HOST,
    tokens_per_batch: int = 4096,
    report: Callable[[int], None] | None = None,
) -> TrunkCache:
    """Run the trunk over every row once.

    Args:
        split: whose trunk; batches go to its device. Under autocast the trunk runs as that says.
        rows: what `collate` takes, one a row, each with `input_ids`.
        collate: pads some rows to a batch with an `attention_mask`.
        room: where the hidden states go.
        tokens_per_batch: at most, padding included, but one row at least.
        report: called with the number of rows that are done.

    Raises:
        OSError: the disk is full.
    """
    device = next(split.model.parameters()).device
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    store: torch.Tensor | None = None
    done = 0
    for numbers in _batches(lengths.tolist(), tokens_per_batch):
        batch = {name: tensor.to(device) for name, tensor in collate([rows[number] for number in numbers]).items()}
        hidden = split.trunk(batch)
        if store is None:
            store = allocate((int(offsets[-1]), hidden.shape[-1]), hidden.dtype, room, device)
        where, _ = _places(offsets, torch.tensor(numbers))
        store.index_copy_(0, where.to(store.device), hidden[batch["attention_mask"].bool()].to(store.device))
        done += len(numbers)
        if report:
            report(done)
    if store is None:
        raise InputError("a trunk needs at least one row")
    return TrunkCache(store, offsets.to(store.device), device, room.place)


def _places(offsets: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the tokens of some rows are, one row after another, and the rows' lengths."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    before = lengths.cumsum(0) - lengths
    where = torch.repeat_interleave(starts - before, lengths)
    return where + torch.arange(len(where), device=where.device), lengths


def _batches(lengths: list[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Row numbers in batches of rows that are about as long, the longest first."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
