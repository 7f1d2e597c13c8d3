"""The training loop of every method: bare PyTorch, the schedule of `train`, a score every so often."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.common.workers import OutOfTime
from benchmarks.glue.tasks import Rows, Task, scores
from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.training.loop import WARMUP_SHARE
from qrlora_deploy.training.precision import halve_frozen

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Schedule:
    """How long and in what steps a run trains.

    Attributes:
        epochs: passes over the rows.
        batch_size: rows a step.
        points: how often the dev rows are scored, the start not counted.
        seed: of the order of the rows and of dropout.
        bf16: autocast to bf16.
        deadline: `time.time()` after which the run is given up; None is never.
    """

    epochs: int
    batch_size: int
    points: int
    seed: int
    bf16: bool
    deadline: float | None = None


@dataclass(frozen=True)
class Trace:
    """What a run did.

    Attributes:
        curve: one record per scored point: step, metrics, and the mean loss since the last one.
        steps: optimiser steps.
        train_seconds: of the steps alone, without scoring.
    """

    curve: list[dict[str, Any]]
    steps: int
    train_seconds: float


def train_model(
    model: nn.Module,
    groups: list[dict[str, Any]],
    task: Task,
    parts: dict[str, Rows],
    schedule: Schedule,
) -> Trace:
    """Train the parameters of `groups` and score the dev rows along the way.

    AdamW without weight decay or clipping, a linear schedule with 6 % of rising steps, as `train`.

    Args:
        model: on the device of the rows; everything that is not in `groups` is frozen.
        groups: `params` and `lr` (the peak) of each.
        task: for loss and scores.
        parts: "train" and "dev".
        schedule: how long.

    Raises:
        OutOfTime: the deadline has passed.
    """
    rows = parts["train"]
    device = rows.targets.device
    if schedule.bf16:
        halve_frozen(model)
    steps = schedule.epochs * math.ceil(len(rows) / schedule.batch_size)
    stops = {round(steps * point / schedule.points) for point in range(1, schedule.points + 1)} | {steps}
    # The optimiser keeps the very dictionaries that it is given, and their rates change in every step.
    optimizer = torch.optim.AdamW([dict(group) for group in groups], weight_decay=0.0, fused=device.type == "cuda")
    curve = [{"step": 0, "metrics": evaluate(model, task, parts["dev"], schedule.bf16)}]
    torch.manual_seed(schedule.seed)
    total = torch.zeros((), device=device)
    seconds, since = 0.0, 0
    start = time.perf_counter()
    model.train()
    for step, (chosen, index) in enumerate(_batches(len(rows), schedule, device), start=1):
        for group, peak in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = peak["lr"] * factor(step - 1, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=schedule.bf16):
            logits: torch.Tensor = model(**rows.batch(chosen, index)).logits
        loss = loss_of(task, logits.float(), rows.targets[index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        if schedule.deadline is not None and time.time() > schedule.deadline:
            raise OutOfTime
        if step in stops:
            mean = float(total) / (step - since)  # waits for the device
            seconds += time.perf_counter() - start
            metrics = evaluate(model, task, parts["dev"], schedule.bf16)
            curve.append({"step": step, "metrics": metrics, "loss": round(mean, 6)})
            total.zero_()
            since, start = step, time.perf_counter()
            model.train()
    return Trace(curve, steps, seconds)


def factor(step: int, steps: int) -> float:
    """Share of the peak learning rate in the step that follows `step` others."""
    rising = int(WARMUP_SHARE * steps)
    if step < rising:
        return step / max(1, rising)
    return max(0.0, (steps - step) / max(1, steps - rising))


def _batches(count: int, schedule: Schedule, device: torch.device) -> Any:
    """Row numbers of each batch, on the CPU and on the device, all epochs one after another."""
    random = np.random.default_rng(schedule.seed)
    for _ in range(schedule.epochs):
        order = random.permutation(count)
        there = torch.from_numpy(order).to(device)
        for start in range(0, count, schedule.batch_size):
            stop = start + schedule.batch_size
            yield order[start:stop], there[start:stop]


def loss_of(task: Task, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch."""
    if task.kind == Regression.name:
        return functional.mse_loss(logits.squeeze(-1), targets)
    return functional.cross_entropy(logits, targets)


def predict(model: nn.Module, rows: Rows, bf16: bool) -> np.ndarray:
    """Logits `[n, labels]` in fp32, in the order of the rows, computed by length."""
    model.eval()
    device = rows.targets.device
    order = np.argsort(rows.lengths, kind="stable")
    there = torch.from_numpy(order).to(device)
    found = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(rows), EVALUATION_BATCH):
            stop = start + EVALUATION_BATCH
            found.append(model(**rows.batch(order[start:stop], there[start:stop])).logits.float())
    logits = torch.cat(found).cpu().numpy()
    whole = np.empty_like(logits)
    whole[order] = logits
    return whole


def evaluate(model: nn.Module, task: Task, rows: Rows, bf16: bool) -> dict[str, float]:
    """The task's metrics on `rows`, and how many classes are answered, or how far numbers are spread.

    A model that answers NaN scores 0.
    """
    logits = predict(model, rows, bf16)
    if not np.isfinite(logits).all():
        return dict.fromkeys(task.metrics, 0.0)
    found = scores(task, logits, rows.targets.cpu().numpy())
    if task.kind == Regression.name:
        return found | {"spread": round(float(logits.std()), 6)}
    return found | {"classes": len(np.unique(logits.argmax(-1)))}
