"""Who trains on which rows at which rate in each step: what the Trainer does for one customer, for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qrlora_deploy.training.loop import WARMUP_SHARE
from qrlora_deploy.training.settings import TrainSettings


@dataclass(frozen=True)
class StepRows:
    """The rows of one step, one element each: all of customer 0, then all of customer 1, ...

    Attributes:
        slots: `[n]` the customers.
        rows: `[n]` their row numbers.
        shares: `[n]` fp64, one over the rows of this customer in this step: the weight of a row's loss.
    """

    slots: np.ndarray
    rows: np.ndarray
    shares: np.ndarray


class Schedule:
    """Order of rows, steps and learning rates of every active customer.

    Each customer's are those of its own run: in epoch e the order is a random permutation of the seed
    plus e (as accelerate's seedable sampler draws it), the last batch of an epoch may be smaller, and
    the rate rises over the first 6 % of its steps and then falls linearly to 0.

    Args:
        slots: how many customers there may be at once.
        settings: epochs, batch size, seed and rates.
    """

    def __init__(self, slots: int, settings: TrainSettings) -> None:
        self.settings = settings
        self.used = np.zeros(slots, dtype=bool)
        self.count, self.per_epoch, self.step, self.epoch = (np.zeros(slots, dtype=np.int64) for _ in range(4))
        self.order = np.zeros((slots, 0), dtype=np.int64)

    @property
    def free(self) -> np.ndarray:
        """Slots without a customer."""
        return np.flatnonzero(~self.used)

    def enter(self, slot: int, rows: int) -> None:
        """A customer with so many training rows begins."""
        self.used[slot], self.count[slot], self.step[slot], self.epoch[slot] = True, rows, 0, 0
        self.per_epoch[slot] = -(-rows // self.settings.batch_size)
        columns = int(self.per_epoch[slot]) * self.settings.batch_size
        if columns > self.order.shape[1]:
            self.order = np.pad(self.order, ((0, 0), (0, columns - self.order.shape[1])))
        self._shuffle(slot)

    def leave(self, slot: int) -> None:
        """A customer's slot is free."""
        self.used[slot] = False

    def next_rows(self) -> StepRows:
        """The next batch of every active customer."""
        size = self.settings.batch_size
        slots = np.flatnonzero(self.used)
        position = (self.step[slots] % self.per_epoch[slots]) * size
        columns = position[:, None] + np.arange(size)
        inside = columns < self.count[slots, None]
        rows = self.order[slots[:, None], np.minimum(columns, self.order.shape[1] - 1)]
        counts = inside.sum(1)
        return StepRows(np.repeat(slots, counts), rows[inside], np.repeat(1.0 / counts, counts))

    def rates(self) -> np.ndarray:
        """`[slots]` fp64, the share of the peak rate of the coming step; 0 without a customer."""
        total = self.settings.epochs * self.per_epoch
        warmup = (WARMUP_SHARE * total).astype(np.int64)
        rising = self.step / np.maximum(1, warmup)
        falling = (total - self.step) / np.maximum(1, total - warmup)
        return np.where(self.used, np.where(self.step < warmup, rising, np.maximum(0.0, falling)), 0.0)

    def advance(self) -> np.ndarray:
        """Count a step of every active customer; returns the slots whose epoch is done."""
        self.step[self.used] += 1
        ended = np.flatnonzero(self.used & (self.step % np.maximum(1, self.per_epoch) == 0))
        self.epoch[ended] += 1
        return ended

    def next_epoch(self, slots: Sequence[int]) -> None:
        """Some customers go on: their rows are shuffled."""
        for slot in slots:
            self._shuffle(slot)

    def _shuffle(self, slot: int) -> None:
        generator = torch.Generator().manual_seed(self.settings.seed + int(self.epoch[slot]))
        count = int(self.count[slot])
        self.order[slot, :count] = torch.randperm(count, generator=generator).numpy()
