"""The learning rate at which one step changes a model's answers by a set amount, measured at the start of a run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn

from qrlora_deploy.tasks.base import Task
from qrlora_deploy.training.settings import LARGEST_DEFAULT_RATE

BATCHES = 8
"""Batches of the start that a gradient is the mean of; fewer where there are fewer rows."""

ALLOWED_CHANGE = 0.01
"""How much of `Task.change` one step at the peak rate may make; see docs/preconditioning.md for where it comes from."""

TOLERANCE = 0.02
"""How near to the allowed change the search ends, as a share of it."""

TRIES = 12
SMALLEST = 1e-6

Batch = TypeVar("Batch")
Answers = torch.Tensor


@dataclass(frozen=True)
class MeasuredRate:
    """What the start of a run says of its steps.

    Attributes:
        rate: the learning rate, of three digits.
        change: of the answers, by a step of this length.
        rows: that were looked at.
    """

    rate: float
    change: float
    rows: int


@dataclass(frozen=True)
class Start(Generic[Batch]):
    """A model at its start, with rows to look at.

    Attributes:
        batches: of training rows.
        targets: of each batch.
        graded: the loss and the answers of a batch, with a gradient and without dropout.
        parameters: the coefficients, in the preconditioned space; they are moved and put back.
        task: says how far answers have moved.
        steps: of the run.
    """

    batches: Sequence[Batch]
    targets: Sequence[torch.Tensor]
    graded: Callable[[Batch], tuple[torch.Tensor, Answers]]
    parameters: Sequence[nn.Parameter]
    task: Task
    steps: int

    @property
    def rows(self) -> int:
        """How many rows are looked at."""
        return sum(map(len, self.targets))


def start_rows(rows: int, batch_size: int, seed: int) -> list[np.ndarray]:
    """Numbers of the rows of each batch that is looked at, drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(rows)[: BATCHES * batch_size]
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def measure_rate(start: Start[Batch], allowed: float = ALLOWED_CHANGE) -> MeasuredRate | None:
    """The rate at which a step against the sign of the mean gradient, as Adam's first one is, changes answers so much.

    Returns:
        None where no step changes anything, or the answers are no numbers.
    """
    before, gradient = _look(start)
    if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
        return None
    kept = [value.detach().clone() for value in start.parameters]
    direction = gradient.sign().split([value.numel() for value in start.parameters])

    def change_at(rate: float) -> float:
        with torch.no_grad():
            for value, own, part in zip(start.parameters, kept, direction, strict=True):
                value.copy_(own - rate * part.view_as(own))
            after = [start.graded(batch)[1] for batch in start.batches]
        return start.task.change(before, after, start.targets)

    try:
        found = _search(change_at, allowed)
    finally:
        with torch.no_grad():
            for value, own in zip(start.parameters, kept, strict=True):
                value.copy_(own)
    return found and MeasuredRate(found[0], found[1], start.rows)


def _look(start: Start[Batch]) -> tuple[list[Answers], torch.Tensor]:
    """The answers to each batch, and the mean gradient `[coefficients]`."""
    answers = []
    total = torch.zeros(sum(value.numel() for value in start.parameters), device=start.parameters[0].device)
    for batch in start.batches:
        loss, found = start.graded(batch)
        parts = torch.autograd.grad(loss, list(start.parameters))
        total += torch.cat([part.flatten() for part in parts])
        answers.append(found.detach())
    return answers, total


def _search(change_at: Callable[[float], float], allowed: float) -> tuple[float, float] | None:
    """The rate with the allowed change, and its change: small changes grow as the square of a step."""
    rate, best = 0.01, None
    for _ in range(TRIES):
        change = change_at(rate)
        if not math.isfinite(change):
            rate /= 10
            continue
        best = (float(f"{rate:.3g}"), change)
        if abs(change / allowed - 1) <= TOLERANCE or (rate == LARGEST_DEFAULT_RATE and change < allowed):
            return best
        growth = math.sqrt(allowed / change) if change > 0 else 10.0
        rate = min(LARGEST_DEFAULT_RATE, max(SMALLEST, rate * min(10.0, max(0.1, growth))))
    return best
