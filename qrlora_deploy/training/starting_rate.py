"""The measured learning rate of a customer that is trained alone."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qrlora_deploy.tasks.base import Task
from qrlora_deploy.training.loop import SmallTrainer
from qrlora_deploy.training.rows import Rows
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.step_size import MeasuredRate, Start, measure_rate, start_rows


def measure_start(
    trainer: SmallTrainer, coefficients: Sequence[nn.Parameter], task: Task, settings: TrainSettings
) -> MeasuredRate | None:
    """Measure a run that has not begun; the model is as before afterwards.

    Args:
        trainer: with its model and rows; without an optimizer yet.
        coefficients: that are trained.
        task: of the rows.
        settings: of the run.
    """
    rows: Rows = trainer.train_dataset  # type: ignore[assignment]
    numbers = start_rows(len(rows), settings.batch_size, settings.seed)
    batches = [trainer._prepare_inputs(trainer.data_collator([rows[row] for row in chosen])) for chosen in numbers]
    model: Any = trainer.model
    model.eval()

    def graded(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        loss, found = trainer.compute_loss(model, batch, return_outputs=True)
        return loss, found["logits"].float()

    steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
    targets = [batch["labels"] for batch in batches]
    return measure_rate(Start(batches, targets, graded, coefficients, task, steps))
