"""Directions chosen by the mean square of their gradients at the start, all layers against each other."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.glue.loop import _loss
from benchmarks.glue.tasks import Rows, Task
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.adapter import attach, detach, precondition

BATCHES, BATCH = 24, 32


def keep_sensitive(model: Any, basis: Basis, count: int, task: Task, rows: Rows, bf16: bool) -> Basis:
    """The `count` directions of a basis with the largest mean square gradient of their preconditioned coefficients.

    Args:
        model: at its start; its layers are as before afterwards.
        basis: every direction.
        count: how many are kept.
        task: for the loss.
        rows: that it is trained on.
        bf16: autocast.
    """
    adapters = attach(model, basis)
    precondition(adapters)
    model.eval()
    parameters = [adapter.u for adapter in adapters.values()]
    total = [torch.zeros_like(value) for value in parameters]
    order = np.random.default_rng(0).permutation(len(rows))
    for number in range(BATCHES):
        chosen = np.take(order, range(number * BATCH, (number + 1) * BATCH), mode="wrap")
        index = torch.from_numpy(chosen).to(rows.targets.device)
        with torch.autocast(rows.targets.device.type, torch.bfloat16, enabled=bf16):
            logits = model(**rows.batch(chosen, index)).logits
        for sums, part in zip(total, torch.autograd.grad(_loss(task, logits.float(), rows.targets[index]), parameters), strict=True):
            sums += part.square()
    detach(model)
    cut = torch.cat(total).topk(min(count, sum(map(len, total)))).values.min()
    targets = []
    for target, sums in zip(basis.targets, total, strict=True):
        kept = (sums >= cut).nonzero().flatten().cpu().numpy()
        if len(kept):
            q, r = np.ascontiguousarray(target.q[:, kept]), np.ascontiguousarray(target.r[kept])
            targets.append(replace(target, q=q, r=r))
    return replace(basis, targets=tuple(targets))
