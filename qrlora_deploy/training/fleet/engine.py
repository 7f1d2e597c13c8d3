"""Steps and answers of all active customers together, in chunks of rows that are about as long."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from qrlora_deploy.errors import InputError
from qrlora_deploy.training.data import Examples
from qrlora_deploy.training.fleet.model import FleetModel
from qrlora_deploy.training.fleet.plan import Customer, Targets
from qrlora_deploy.training.fleet.pool import RowPool, to_device
from qrlora_deploy.training.fleet.schedule import StepRows
from qrlora_deploy.training.fleet.scoring import Answers
from qrlora_deploy.training.loop import Rows, build_rows
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.tasks import REGRESSION

CHUNK_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of a chunk, padding included: few enough for a CPU's cache, enough to fill a GPU."""


Chunk = tuple[np.ndarray, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Engine:
    """Runs a `FleetModel` over rows of many customers.

    Args:
        model: base and tables.
        slots: how many customers are active at once.
        settings: rates and the length of texts.
        limit_bytes: of the trunk's hidden states.
    """

    def __init__(self, model: FleetModel, slots: int, settings: TrainSettings, limit_bytes: int) -> None:
        self.model, self.settings, self.device = model, settings, model.device
        left = model.tokenizer.padding_side == "left"
        self.pool = RowPool(slots, model.pad, left, model.device, limit_bytes)
        self.targets = np.zeros((slots, 0))
        self.train_rows, self.held_out_rows = (np.zeros(slots, dtype=np.int64) for _ in range(2))
        self.regression = np.zeros(slots, dtype=bool)
        self.losses = torch.zeros(slots, dtype=torch.float64, device=model.device)
        self.chunk_tokens = CHUNK_TOKENS[model.device.type]

    def tokenize(self, customer: Customer) -> Rows:
        """All rows of a customer, the held-out ones last."""
        parts: list[tuple[Examples | None, Targets]] = [
            (customer.train, customer.targets),
            (customer.evaluation, customer.evaluation_targets),
        ]
        length = self.settings.max_length
        return [
            row
            for examples, targets in parts
            if examples
            for row in build_rows(self.model.tokenizer, examples, targets, length)
        ]

    def has_room(self, tokens: int) -> bool:
        """Whether the hidden states of so many more tokens may be kept."""
        if self.model.split is None:
            return True
        width = int(self.model.model.config.get_text_config().hidden_size)
        return self.pool.has_room(tokens, width * torch.float32.itemsize)

    def enter(self, slots: list[int], customers: list[Customer], rows: list[Rows]) -> dict[int, str]:
        """Customers begin; the trunk runs over all their rows.

        Returns:
            Reasons by slot of customers whose rows cannot be used; those have not begun.
        """
        wrong: dict[int, str] = {}
        for slot, customer, part in zip(slots, customers, rows, strict=True):
            try:
                self.pool.add(slot, part)
            except InputError as error:
                wrong[slot] = str(error)
                continue
            self._set_targets(slot, [*customer.targets, *customer.evaluation_targets])
            self.train_rows[slot], self.held_out_rows[slot] = len(customer.targets), len(customer.evaluation_targets)
            self.regression[slot] = customer.outputs.task == REGRESSION
        begun = [(slot, customer) for slot, customer in zip(slots, customers, strict=True) if slot not in wrong]
        if begun:
            where = [slot for slot, _ in begun]
            self.model.enter(where, [customer.outputs for _, customer in begun])
            self.losses[where] = 0.0
            self._run_trunk(self._rows(where, np.zeros_like(self.train_rows), self.train_rows + self.held_out_rows))
        return wrong

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
        with self.model.precision(training=True):
            for _, slots, targets, weights, logits in self._chunks(rows):
                losses = self._row_losses(logits, slots, targets) * weights
                # A sum over customers: no customer's gradient depends on who else is in the step.
                losses.sum().backward()
                self.losses.index_add_(0, slots, losses.detach().double())
        share = torch.from_numpy(shares).to(self.device, torch.float32)
        rates = {
            "coefficients": share * self.settings.rate,
            "head": share * self.settings.head_learning_rate,
        }
        count = torch.from_numpy(np.maximum(steps, 1)).to(self.device, torch.float32)
        self.model.step(rates, count)

    def take_losses(self, slots: np.ndarray) -> np.ndarray:
        """Sums of the losses of some customers' steps since they were last taken."""
        where = torch.from_numpy(slots).to(self.device)
        taken = self.losses[where].cpu().numpy()
        self.losses[where] = 0.0
        return taken

    def answer_held_out(self, slots: list[int]) -> Answers:
        """What some customers answer to their held-out rows."""
        rows = self._rows(slots, self.train_rows, self.held_out_rows)
        regression = torch.from_numpy(self.regression).to(self.device)
        parts, values, finite = [], [], []
        with self.model.precision(training=False):
            for part, owners, _, _, logits in self._chunks(rows):
                parts.append(part)
                chosen = torch.where(regression[owners], logits[:, 0].double(), logits.argmax(1).double())
                values.append(chosen)
                absent = self.model.limits[owners] < 0
                finite.append((logits.isfinite() | absent).all(1))
        order = np.concatenate(parts)
        found, sound = np.zeros(len(order)), np.zeros(len(order), dtype=bool)
        found[order], sound[order] = torch.cat(values).cpu().numpy(), torch.cat(finite).cpu().numpy()
        return Answers(rows.slots, found, self.targets[rows.slots, rows.rows], sound)

    def _rows(self, slots: list[int], first: np.ndarray, count: np.ndarray) -> StepRows:
        """Rows `first` to `first + count` of some customers."""
        owners = np.repeat(slots, count[slots])
        ends = np.cumsum(count[slots])
        within = np.arange(len(owners)) - np.repeat(ends - count[slots], count[slots])
        return StepRows(owners, first[owners] + within, np.ones(len(owners)))

    def _parts(self, rows: StepRows) -> Iterator[np.ndarray]:
        """Positions in `rows`, cut into chunks; the longest rows first, but ascending within a chunk."""
        lengths = self.pool.lengths[rows.slots, rows.rows]
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            size = max(1, self.chunk_tokens // int(lengths[order[start]]))
            yield order[start : start + size][::-1]
            start += size

    def _chunks(self, rows: StepRows) -> Iterator[Chunk]:
        """Positions in `rows` of each chunk, and its slots, targets, weights and logits, all on the device."""
        for part in self._parts(rows):
            owners, numbers = rows.slots[part], rows.rows[part]
            places = _places(owners)
            slots, on_device = to_device(np.stack([owners, places]), self.device)
            real = to_device(np.stack([self.targets[owners, numbers], rows.shares[part]]), self.device)
            self.model.give(slots, on_device, int(places.max()) + 1)
            yield part, slots, real[0], real[1].float(), self._logits(owners, numbers)

    def _logits(self, owners: np.ndarray, numbers: np.ndarray) -> torch.Tensor:
        starts, lengths = self.pool.starts(owners, numbers), self.pool.lengths[owners, numbers]
        if self.model.upper is not None:
            return self.model.logits_packed(self.pool.packed_hidden(starts, lengths))
        where, there = to_device(np.stack([starts, lengths]), self.device)
        length = int(lengths.max())
        hidden = self.pool.padded_hidden(where, there, length) if self.model.split else None
        return self.model.logits_padded(self.pool.pad_rows(where, there, length), hidden)

    def _run_trunk(self, rows: StepRows) -> None:
        if self.model.split is None:
            return
        with self.model.precision(training=False):
            for part in self._parts(rows):
                owners, numbers = rows.slots[part], rows.rows[part]
                lengths = self.pool.lengths[owners, numbers]
                starts, there = to_device(np.stack([self.pool.starts(owners, numbers), lengths]), self.device)
                batch = self.pool.pad_rows(starts, there, int(lengths.max()))
                self.pool.fill(starts, there, self.model.trunk(batch))

    def _row_losses(self, logits: torch.Tensor, slots: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`[rows]`: the squared error of a regression, the cross entropy of a classification."""
        if not self.regression.any():
            return functional.cross_entropy(logits, targets.long(), reduction="none")
        squares = (logits[:, 0] - targets.float()) ** 2
        number = torch.from_numpy(self.regression).to(self.device)[slots]
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
