"""Steps and answers of all active customers together, in chunks of rows that are about as long."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.training.fleet.model import FleetModel
from qrlora_deploy.training.fleet.plan import Customer
from qrlora_deploy.training.fleet.pool import PackedRows, RowPool
from qrlora_deploy.training.fleet.schedule import StepRows
from qrlora_deploy.training.fleet.scoring import Answers
from qrlora_deploy.training.fleet.shipping import ship
from qrlora_deploy.training.fleet.tokens import TokenRows
from qrlora_deploy.training.settings import TrainSettings

CHUNK_TOKENS = {"cpu": 2048, "cuda": 65536}
"""Tokens of a chunk, padding included: few enough for a CPU's cache, enough to fill a GPU."""
BYTES_BY_WIDTH = 60
"""Of activations, for each token, adapted block and value of the width, at most; 25 stay for the backward pass."""


@dataclass(frozen=True)
class Chunk:
    """Rows that are computed together, shortest first.

    Attributes:
        positions: `[rows]`, which of the step's rows these are.
        longest: tokens of the longest one.
        places_end: one more than the largest of `places`.
        slots: `[rows]` int64, whose row each is.
        places: `[rows]` int64, which of its customer's rows here it is: 0, 1, ...
        starts: `[rows]` int64, where it begins in the pool.
        lengths: `[rows]` int64.
        targets: `[rows]` fp64.
        weights: `[rows]` fp32, of its loss.
        packed: its tokens; None where rows are computed with padding.
    """

    positions: np.ndarray
    longest: int
    places_end: int
    slots: torch.Tensor
    places: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    packed: PackedRows | None


class Engine:
    """Runs a `FleetModel` over rows of many customers.

    Args:
        model: base and tables.
        slots: how many customers are active at once.
        settings: rates and the length of texts.
        limit_bytes: of the trunk's hidden states, and of the activations of a chunk.
    """

    def __init__(self, model: FleetModel, slots: int, settings: TrainSettings, limit_bytes: int) -> None:
        self.model, self.settings, self.device = model, settings, model.device
        left = model.tokenizer.padding_side == "left"
        self.pool = RowPool(slots, model.pad, left, model.device, limit_bytes)
        self.width = int(model.model.config.get_text_config().hidden_size)
        self.targets = np.zeros((slots, 0))
        self.train_rows, self.held_out_rows = (np.zeros(slots, dtype=np.int64) for _ in range(2))
        self.regression = np.zeros(slots, dtype=bool)
        self.regression_there = torch.zeros(slots, dtype=torch.bool, device=model.device)
        self.losses = torch.zeros(slots, dtype=torch.float64, device=model.device)
        room = limit_bytes // (BYTES_BY_WIDTH * self.width * model.blocks)
        self.chunk_tokens = max(1, min(CHUNK_TOKENS[model.device.type], room))

    def has_room(self, tokens: int) -> bool:
        """Whether the hidden states of so many more tokens may be kept."""
        if self.model.split is None:
            return True
        return self.pool.has_room(tokens, self.width * torch.float32.itemsize)

    def enter(self, slots: list[int], customers: list[Customer], rows: list[TokenRows]) -> None:
        """Customers begin; the trunk runs over all their rows."""
        self.pool.reserve(sum(int(part.lengths.sum()) for part in rows))
        for slot, customer, part in zip(slots, customers, rows, strict=True):
            self.pool.add(slot, part)
            self._set_targets(slot, [*customer.targets, *customer.evaluation_targets])
            self.train_rows[slot], self.held_out_rows[slot] = len(customer.targets), len(customer.evaluation_targets)
            self.regression[slot] = isinstance(customer.outputs.task, Regression)
        self.regression_there = ship(torch.from_numpy(self.regression.copy()), self.device)
        self.model.enter(slots, [customer.outputs for customer in customers])
        self.losses.index_fill_(0, ship(torch.tensor(slots), self.device), 0.0)
        self._run_trunk(self._rows(slots, np.zeros_like(self.train_rows), self.train_rows + self.held_out_rows))

    def leave(self, slot: int) -> None:
        """A customer's rows are forgotten."""
        self.pool.remove(slot)

    def train_step(self, rows: StepRows, shares: np.ndarray, steps: np.ndarray) -> None:
        """One step of every customer with rows.

        Args:
            rows: the batches of all customers.
            shares: `[slots]`, of the peak learning rates.
            steps: `[slots]`, how many steps each customer has made with this one.
        """
        chunks, share, count = ship(
            (self._chunks(rows), torch.from_numpy(shares).float(), torch.from_numpy(np.maximum(steps, 1)).float()),
            self.device,
        )
        with self.model.precision(training=True):
            for chunk in chunks:
                losses = self._row_losses(self._logits(chunk), chunk.slots, chunk.targets) * chunk.weights
                # A sum over customers: no customer's gradient depends on who else is in the step.
                losses.sum().backward()
                self.losses.index_add_(0, chunk.slots, losses.detach().double())
        rates = {
            "coefficients": share * self.settings.rate,
            "head": share * self.settings.head_learning_rate,
        }
        self.model.step(rates, count)

    def take_losses(self, slots: np.ndarray) -> np.ndarray:
        """Sums of the losses of some customers' steps since they were last taken; waits for these steps."""
        where = ship(torch.from_numpy(slots), self.device)
        taken: np.ndarray = self.losses.index_select(0, where).cpu().numpy()
        self.losses.index_fill_(0, where, 0.0)
        return taken

    def answer_held_out(self, slots: list[int]) -> Answers:
        """What some customers answer to their held-out rows."""
        rows = self._rows(slots, self.train_rows, self.held_out_rows)
        chunks = ship(self._chunks(rows), self.device)
        answers = []
        with self.model.precision(training=False):
            for chunk in chunks:
                logits = self._logits(chunk)
                number = self.regression_there[chunk.slots]
                chosen = torch.where(number, logits[:, 0].double(), logits.argmax(1).double())
                finite = (logits.isfinite() | (self.model.limits[chunk.slots] < 0)).all(1)
                answers.append(torch.stack([chosen, finite.double()]))
        order = np.concatenate([chunk.positions for chunk in chunks])
        found = np.zeros((2, len(order)))
        found[:, order] = torch.cat(answers, 1).cpu().numpy()
        return Answers(rows.slots, found[0], self.targets[rows.slots, rows.rows], found[1] > 0)

    def _rows(self, slots: list[int], first: np.ndarray, count: np.ndarray) -> StepRows:
        """Rows `first` to `first + count` of some customers."""
        owners = np.repeat(slots, count[slots])
        ends = np.cumsum(count[slots])
        within = np.arange(len(owners)) - np.repeat(ends - count[slots], count[slots])
        return StepRows(owners, first[owners] + within, np.ones(len(owners)))

    def _parts(self, rows: StepRows, padded: bool) -> Iterator[np.ndarray]:
        """Positions in `rows`, cut into chunks; the longest rows first, but ascending within a chunk."""
        lengths = self.pool.lengths[rows.slots, rows.rows]
        order = np.argsort(-lengths, kind="stable")
        if padded:
            start = 0
            while start < len(order):
                size = max(1, self.chunk_tokens // int(lengths[order[start]]))
                yield order[start : start + size][::-1]
                start += size
            return
        before = np.cumsum(lengths[order]) - lengths[order]
        count = -(-int(lengths.sum()) // self.chunk_tokens)
        edges = np.searchsorted(before, np.arange(1, count) * (int(lengths.sum()) / count))
        yield from (part[::-1] for part in np.split(order, edges) if len(part))

    def _chunks(self, rows: StepRows) -> tuple[Chunk, ...]:
        """The rows in chunks, on the host."""
        padded = self.model.upper is None
        return tuple(self._chunk(rows, part, padded) for part in self._parts(rows, padded))

    def _chunk(self, rows: StepRows, part: np.ndarray, padded: bool) -> Chunk:
        owners, numbers = rows.slots[part], rows.rows[part]
        places, starts = _places(owners), self.pool.starts(owners, numbers)
        lengths = self.pool.lengths[owners, numbers]
        return Chunk(
            positions=part,
            longest=int(lengths[-1]),
            places_end=int(places.max()) + 1,
            slots=torch.from_numpy(owners),
            places=torch.from_numpy(places),
            starts=torch.from_numpy(starts),
            lengths=torch.from_numpy(lengths),
            targets=torch.from_numpy(self.targets[owners, numbers]),
            weights=torch.from_numpy(rows.shares[part]).float(),
            packed=None if padded else self.pool.pack(starts, lengths),
        )

    def _logits(self, chunk: Chunk) -> torch.Tensor:
        """`[rows, labels]` of a chunk whose tensors are on the device."""
        self.model.give(chunk.slots, chunk.places, chunk.places_end)
        packed = chunk.packed
        if packed is not None:
            return self.model.logits_packed(self.pool.packed_hidden(packed), packed.layout, packed.token_rows)
        place = (chunk.starts, chunk.lengths, chunk.longest)
        hidden = self.pool.padded_hidden(*place) if self.model.split else None
        return self.model.logits_padded(self.pool.pad_rows(*place), hidden)

    def _run_trunk(self, rows: StepRows) -> None:
        if self.model.split is None:
            return
        chunks = ship(
            tuple(self._chunk(rows, part, padded=True) for part in self._parts(rows, padded=True)), self.device
        )
        with self.model.precision(training=False):
            for chunk in chunks:
                hidden = self.model.trunk(self.pool.pad_rows(chunk.starts, chunk.lengths, chunk.longest))
                self.pool.fill(chunk.starts, chunk.lengths, hidden)

    def _row_losses(self, logits: torch.Tensor, slots: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`[rows]`: the squared error of a regression, the cross entropy of a classification."""
        if not self.regression.any():
            return functional.cross_entropy(logits, targets.long(), reduction="none")
        squares = (logits[:, 0] - targets.float()) ** 2
        number = self.regression_there[slots]
        classes = torch.where(number, 0, targets.long())
        # Negative numbers of a regression are no labels: such a row is looked up as label 0 and not used.
        return torch.where(number, squares, functional.cross_entropy(logits, classes, reduction="none"))

    def _set_targets(self, slot: int, targets: list[float]) -> None:
        missing = len(targets) - self.targets.shape[1]
        if missing > 0:
            self.targets = np.pad(self.targets, ((0, 0), (0, missing)))
        self.targets[slot, : len(targets)] = targets


def free_share(free_bytes: int) -> int:
    """How much of what is free the hidden states may take: a quarter.

    The pool has up to half as much again, and while it grows it is there twice.
    """
    return free_bytes // 4


def _places(owners: np.ndarray) -> np.ndarray:
    """Which row of its owner each row is: 0, 1, ... in their order here."""
    order = np.argsort(owners, kind="stable")
    together = owners[order]
    places = np.empty(len(owners), dtype=np.int64)
    places[order] = np.arange(len(owners)) - np.searchsorted(together, together)
    return places
