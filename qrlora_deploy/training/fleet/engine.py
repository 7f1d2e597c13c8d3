"""Steps and answers of all active customers together, in chunks of rows that are about as long."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from qrlora_deploy.tasks.base import Task
from qrlora_deploy.training.fleet.customers import Customer
from qrlora_deploy.training.fleet.model import FleetModel
from qrlora_deploy.training.fleet.pool import PackedRows, RowPool
from qrlora_deploy.training.fleet.schedule import StepRows
from qrlora_deploy.training.fleet.scoring import Answers
from qrlora_deploy.training.fleet.shipping import ship
from qrlora_deploy.training.fleet.targets import TargetTable
from qrlora_deploy.training.fleet.tokens import TokenRows, answer_counts
from qrlora_deploy.training.settings import TrainSettings

CHUNK_TOKENS = {"cpu": 2048, "cuda": 65536}
"""Tokens of a chunk, padding included: few enough for a CPU's cache, enough to fill a GPU."""
BYTES_BY_WIDTH = 60
"""Of activations, for each token, adapted block and value of the width, at most; 25 stay for the backward pass."""


@dataclass(frozen=True)
class TaskRows:
    """Those rows of a chunk whose customers have one task.

    Attributes:
        task: theirs.
        rows: `[n]` int64, which rows of the chunk they are; None where they are all.
        targets: `[n]` fp64, or `[n, labels]` where the task `judges_labels`.
    """

    task: Task
    rows: torch.Tensor | None
    targets: torch.Tensor

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """`[n]` of logits `[rows, labels]` of the chunk."""
        own = logits if self.rows is None else logits.index_select(0, self.rows)
        # As many labels as the customers here have, not as the largest of all.
        own = own[:, : self.targets.shape[1]] if self.task.judges_labels else own
        return self.task.row_losses(own, self.targets)


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
        parts: its rows by task.
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
    parts: tuple[TaskRows, ...]
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
        left = model.tokenizer.padding_side == "left" and not model.writes_text
        self.pool = RowPool(slots, model.pad, left, model.device, limit_bytes)
        self.width = int(model.model.config.get_text_config().hidden_size)
        self.targets = TargetTable(slots)
        self.tasks: list[Task] = []
        self.kinds = np.zeros(slots, dtype=np.int64)  # by slot, the place of its task in `tasks`
        self.train_rows, self.held_out_rows = (np.zeros(slots, dtype=np.int64) for _ in range(2))
        self.answer_tokens: dict[int, np.ndarray] = {}  # by slot, how many tokens of each row are learned
        self.rates = np.zeros(slots)  # by slot, the peak rate of its coefficients
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
            held_out = part.held_out if self.model.writes_text else len(customer.evaluation_targets)
            self.train_rows[slot], self.held_out_rows[slot] = len(part.lengths) - held_out, held_out
            self.kinds[slot] = self._kind(customer.outputs.task)
            self.rates[slot] = customer.settings.rate
        if self.model.writes_text:
            self.answer_tokens |= {slot: answer_counts(part) for slot, part in zip(slots, rows, strict=True)}
            self.targets.enter(slots, [[0.0] * len(part.lengths) for part in rows])
        else:
            self.targets.enter(slots, [[*customer.targets, *customer.evaluation_targets] for customer in customers])
        self.model.enter(slots, [customer.outputs for customer in customers])
        self.losses.index_fill_(0, ship(torch.tensor(slots), self.device), 0.0)
        self._run_trunk(self._rows(slots, np.zeros_like(self.train_rows), self.train_rows + self.held_out_rows))

    def leave(self, slot: int) -> None:
        """A customer's rows are forgotten."""
        self.pool.remove(slot)
        self.targets.leave(slot)

    def train_step(self, rows: StepRows, shares: np.ndarray, steps: np.ndarray) -> None:
        """One step of every customer with rows.

        Args:
            rows: the batches of all customers.
            shares: `[slots]`, of the peak learning rates.
            steps: `[slots]`, how many steps each customer has made with this one.
        """
        rows = self._by_tokens(rows) if self.model.writes_text else rows
        own, head, count = (
            torch.from_numpy(numbers).float()
            for numbers in (shares * self.rates, shares * self.settings.head_learning_rate, np.maximum(steps, 1))
        )
        chunks, own, head, count = ship((self._chunks(rows), own, head, count), self.device)
        with self.model.precision(training=True):
            for chunk in chunks:
                losses = self._row_losses(self._logits(chunk), chunk) * chunk.weights
                # A sum over customers: no customer's gradient depends on who else is in the step.
                losses.sum().backward()
                self.losses.index_add_(0, chunk.slots, losses.detach().double())
        self.model.step({"coefficients": own, "head": head}, count)

    def _by_tokens(self, rows: StepRows) -> StepRows:
        """The same rows, of whose losses each token of a customer's batch has the same share."""
        counts = [self.answer_tokens[slot][row] for slot, row in zip(rows.slots, rows.rows, strict=True)]
        totals = np.bincount(rows.slots, counts)
        return StepRows(rows.slots, rows.rows, 1.0 / np.maximum(totals[rows.slots], 1))

    def take_losses(self, slots: np.ndarray) -> np.ndarray:
        """Sums of the losses of some customers' steps since they were last taken; waits for these steps."""
        where = ship(torch.from_numpy(slots), self.device)
        taken: np.ndarray = self.losses.index_select(0, where).cpu().numpy()
        self.losses.index_fill_(0, where, 0.0)
        return taken

    def answer_held_out(self, slots: list[int]) -> list[Answers]:
        """What some customers answer to their held-out rows, task by task."""
        kinds = sorted({int(self.kinds[slot]) for slot in slots})
        return [self._answers(self.tasks[kind], [slot for slot in slots if self.kinds[slot] == kind]) for kind in kinds]

    def _answers(self, task: Task, slots: list[int]) -> Answers:
        """The same of customers of one task."""
        rows = self._rows(slots, self.train_rows, self.held_out_rows)
        targets = self._targets(task, rows.slots, rows.rows)
        chunks = ship(self._chunks(rows), self.device)
        found = []
        with self.model.precision(training=False):
            for chunk in chunks:
                logits = self._logits(chunk)
                finite = (logits.isfinite() | (self.model.limits[chunk.slots] < 0)).all(1, keepdim=True)
                own = logits[:, : targets.shape[1]] if task.judges_labels else logits
                found.append(torch.cat([task.decisive(own).double(), finite.double()], 1))
        there = torch.cat(found).cpu().numpy()
        order = np.argsort(np.concatenate([chunk.positions for chunk in chunks]))
        return Answers(task, rows.slots, there[order, :-1], targets, there[order, -1] > 0)

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
            parts=tuple(self._task_rows(owners, numbers)),
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

    def _task_rows(self, owners: np.ndarray, numbers: np.ndarray) -> Iterator[TaskRows]:
        """Rows by the task of their customers, on the host."""
        kinds = self.kinds[owners]
        there = np.unique(kinds).tolist()
        for kind in there:
            own = np.flatnonzero(kinds == kind)
            targets = self._targets(self.tasks[kind], owners[own], numbers[own])
            every = len(there) == 1
            yield TaskRows(self.tasks[kind], None if every else torch.from_numpy(own), torch.from_numpy(targets))

    def _targets(self, task: Task, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        targets = self.targets.of(slots, rows)
        return targets if task.judges_labels else targets[:, 0]

    def _row_losses(self, logits: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """`[rows]` fp32, as each customer's task has it."""
        losses = logits.new_zeros(len(logits))
        for part in chunk.parts:
            own = part.losses(logits)
            losses = own if part.rows is None else losses.index_copy(0, part.rows, own)
        return losses

    def _kind(self, task: Task) -> int:
        if task not in self.tasks:
            self.tasks.append(task)
        return self.tasks.index(task)


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
