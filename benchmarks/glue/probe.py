"""What one step of a given length does to a model's answers, by several measures: to choose one of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.glue.loop import loss_of
from benchmarks.glue.tasks import Rows, Task
from qrlora_deploy.tasks.regression import Regression

BATCHES, BATCH = 8, 32
LENGTHS = tuple(2.0**power for power in range(-12, 1))
"""Rates of a step."""


def probe(model: nn.Module, parameters: Sequence[nn.Parameter], task: Task, rows: Rows, seed: int) -> dict[str, Any]:
    """Measures of steps in some directions, at `LENGTHS`, over `BATCHES` batches without dropout."""
    model.eval()
    order = np.random.default_rng(seed).permutation(len(rows))[: BATCHES * BATCH]
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    gradients = torch.stack([_gradient(model, parameters, task, rows, chosen) for chosen in batches])
    tail = _TailInput(model)
    before = [value.detach().clone() for value in parameters]
    mean, rms = gradients.mean(0), gradients.square().mean(0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randint(0, 2, mean.shape, generator=generator).to(mean) * 2 - 1 for _ in range(2)]
    directions = {
        "mean": [mean.sign()],
        "snr": [mean / (rms + 1e-12)],
        "batch": [gradient.sign() for gradient in gradients[:2]],
        "random": noise,
        "raw": [mean * len(mean) ** 0.5 / mean.norm().clamp(min=1e-30)],
    }
    start = _answers(model, rows, order, tail)
    found: dict[str, Any] = {"lengths": LENGTHS, "count": len(mean)}
    for name, ways in directions.items():
        lists: dict[str, list[float]] = {}
        for length in LENGTHS:
            sums: dict[str, float] = {}
            for way in ways:
                _place(parameters, before, -length * way)
                after = _answers(model, rows, order, tail)
                for key, value in _measures(task, start, after, rows, order).items():
                    sums[key] = sums.get(key, 0.0) + value / len(ways)
            for key, value in sums.items():
                lists.setdefault(key, []).append(float(f"{value:.5g}"))
        found[name] = lists
    _place(parameters, before, torch.zeros_like(mean))
    tail.close()
    found["l1_mean"] = float(mean.abs().sum())
    found["l2_mean"] = float(mean.norm())
    found["l2_rms"] = float(rms.norm())
    found["snr_mean_abs"] = float((mean / (rms + 1e-12)).abs().mean())
    return found


class _TailInput:
    """Catches what the last linear layer of the head reads."""

    def __init__(self, model: nn.Module) -> None:
        inside = str(model.base_model_prefix)
        outer = [module for name, module in model.named_modules() if not name.startswith(inside)]
        last = [module for module in outer if isinstance(module, nn.Linear)][-1]
        self.value = torch.empty(0)
        self._hook = last.register_forward_pre_hook(self._catch)

    def _catch(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.value = inputs[0].detach()

    def close(self) -> None:
        self._hook.remove()


def _gradient(
    model: nn.Module, parameters: Sequence[nn.Parameter], task: Task, rows: Rows, chosen: np.ndarray
) -> torch.Tensor:
    index = torch.from_numpy(chosen).to(rows.targets.device)
    logits: torch.Tensor = model(**rows.batch(chosen, index)).logits
    loss = loss_of(task, logits.float(), rows.targets[index])
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]).float()


@torch.no_grad()
def _place(parameters: Sequence[nn.Parameter], before: Sequence[torch.Tensor], step: torch.Tensor) -> None:
    for value, own, part in zip(parameters, before, step.split([p.numel() for p in parameters]), strict=True):
        value.copy_(own + part.view_as(own))


@torch.no_grad()
def _answers(model: nn.Module, rows: Rows, order: np.ndarray, tail: _TailInput) -> tuple[torch.Tensor, torch.Tensor]:
    logits, features = [], []
    for first in range(0, len(order), 128):
        chosen = order[first : first + 128]
        index = torch.from_numpy(chosen).to(rows.targets.device)
        logits.append(model(**rows.batch(chosen, index)).logits.double())
        features.append(tail.value.double())
    return torch.cat(logits), torch.cat(features)


Answers = tuple[torch.Tensor, torch.Tensor]


def _measures(task: Task, before: Answers, after: Answers, rows: Rows, order: np.ndarray) -> dict[str, float]:
    (z, h), (z1, h1) = before, after
    targets = rows.targets[torch.from_numpy(order).to(rows.targets.device)]
    found: dict[str, torch.Tensor] = {}
    if task.kind == Regression.name:
        variance = targets.double().var(correction=0)
        found["kl"] = (z1 - z).square().mean() / (2 * variance)
        found["loss"] = ((z1[:, 0] - targets) ** 2 - (z[:, 0] - targets) ** 2).mean() / (2 * variance)
        found["relative"] = (z1 - z).square().mean() / (z - z.mean(0)).square().mean().clamp(min=1e-30)
    else:
        old, new = z.log_softmax(-1), z1.log_softmax(-1)
        found["kl"] = (old.exp() * (old - new)).sum(-1).mean()
        change = new.gather(1, targets[:, None]) - old.gather(1, targets[:, None])
        found["nll_ms"] = change.square().mean()
        found["loss"] = -change.mean()
        zc, z1c = z - z.mean(1, keepdim=True), z1 - z1.mean(1, keepdim=True)
        found["relative"] = (z1c - zc).square().mean() / (zc - zc.mean(0)).square().mean().clamp(min=1e-30)
    found["features"] = (h1 - h).square().mean() / (h - h.mean(0)).square().mean().clamp(min=1e-30)
    return {name: float(value) for name, value in found.items()}
