"""One run of either method, and its scores on held-out rows."""

import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.decoder_rate.plan import ALPHA, RANK, Planned
from benchmarks.decoder_rate.tasks import Task
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.tasks.answer_rows import answer_rows
from qrlora_deploy.tasks.causal_lm import CausalLM
from qrlora_deploy.training.answers import AnswerCollator
from qrlora_deploy.training.loop import WARMUP_SHARE
from qrlora_deploy.training.precision import has_bf16
from qrlora_deploy.training.rows import Rows
from qrlora_deploy.training.settings import TrainSettings, default_rate
from qrlora_deploy.training.trainer import train

EPOCHS, BATCH_SIZE, LENGTH = 2, 16, 96


def run(planned: Planned, task: Task, checkpoint: Checkpoint, basis: Basis, device: str) -> dict[str, Any]:
    """Train and score; the scores are those of the epoch with the smaller `nll`.

    Args:
        planned: which run.
        task: its rows.
        checkpoint: a decoder.
        basis: of its set-up; LoRA has the same layers.
        device: "cpu" or "cuda".
    """
    start = time.perf_counter()
    method = _coefficients if planned.method == "coefficients" else _lora
    found = method(planned, task, checkpoint, basis, device)
    return asdict(planned) | found | {"seconds": round(time.perf_counter() - start, 1)}


def _coefficients(planned: Planned, task: Task, checkpoint: Checkpoint, basis: Basis, device: str) -> dict[str, Any]:
    rate = default_rate(basis.total_rank, planned.factor or 1.0)
    settings = TrainSettings(
        epochs=EPOCHS, batch_size=BATCH_SIZE, max_length=LENGTH, seed=planned.seed, learning_rate=rate, device=device
    )
    with tempfile.TemporaryDirectory() as work:
        record = train(checkpoint, basis, task.train, task.held_out, settings, Path(work)).training
    kept = {name: record[name] for name in ("learning_rate", "steps", "baseline", "metrics", "loss", "device")}
    return {"trained": basis.total_rank} | kept


def _lora(planned: Planned, task: Task, checkpoint: Checkpoint, basis: Basis, device: str) -> dict[str, Any]:
    """PEFT's LoRA by the schedule of `train`: Adam, a linear warm-up and a linear way down, nothing clipped."""
    torch.manual_seed(planned.seed)
    rate = planned.rate or 0.0
    tokenizer = checkpoint.tokenizer()
    rows, held_out = (answer_rows(tokenizer, part, LENGTH).rows for part in (task.train, task.held_out))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[target.name for target in basis.targets])
    model = get_peft_model(checkpoint.load_model(), config).to(device).get_base_model()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    steps = EPOCHS * math.ceil(len(rows) / BATCH_SIZE)
    warm = int(WARMUP_SHARE * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / max(warm, 1) if step < warm else (steps - step) / max(steps - warm, 1)
    )
    epochs = []
    for _ in range(EPOCHS):
        order = torch.randperm(len(rows)).tolist()
        loss = 0.0
        for first in range(0, len(rows), BATCH_SIZE):
            taken = [rows[number] for number in order[first : first + BATCH_SIZE]]
            step = _graded(model, taken, device)[0]
            step.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            loss += float(step.detach()) * len(taken) / len(rows)
        epochs.append(_score(model, held_out, device) | {"loss": loss})
    best = min(epochs, key=lambda epoch: epoch["nll"])
    metrics = {name: round(best[name], 6) for name in CausalLM.metrics}
    return {
        **{"trained": sum(weight.numel() for weight in weights), "learning_rate": rate, "steps": steps},
        **{"baseline": {}, "metrics": metrics, "loss": round(epochs[-1]["loss"], 6), "device": device},
    }


def _graded(model: Any, rows: Rows, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a batch, what `CausalLM.graded` says of it, and its targets."""
    batch = {name: value.to(device) for name, value in AnswerCollator(0)(rows).items()}
    targets = batch.pop("labels")
    with torch.autocast(device, torch.bfloat16, enabled=has_bf16(device)):
        graded = CausalLM().graded(model, batch, targets)
    return CausalLM().loss(graded, targets), graded, targets


def _score(model: Any, rows: Rows, device: str) -> dict[str, float]:
    """Metrics over all rows: `nll` and `token_accuracy` by token, `exact_match` by row."""
    sums = dict.fromkeys(CausalLM.metrics, 0.0)
    tokens = 0
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(rows), BATCH_SIZE):
            _, graded, targets = _graded(model, rows[first : first + BATCH_SIZE], device)
            found = CausalLM().score(graded.float().cpu().numpy(), targets.cpu().numpy())
            count = int((targets[:, 1:] >= 0).sum())
            tokens += count
            for name, value in found.items():
                sums[name] += value * (len(targets) if name == "exact_match" else count)
    model.train()
    return {name: value / (len(rows) if name == "exact_match" else tokens) for name, value in sums.items()}
