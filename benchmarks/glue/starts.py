"""Where every method starts: the pretrained encoder with a fresh head, or the same after a short warm-up."""

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from benchmarks.glue.tasks import Task
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.head import start_bias
from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.training.loop import no_dropout

PRETRAINED = "pretrained"
WARMED = "warmed"
STARTS = (WARMED, PRETRAINED)

WARMUP_RATE = 5e-5
WARMUP_EPOCHS = 3
WARMUP_SHARE = 0.25
"""Of the training rows, drawn by the seed."""


class Models:
    """Models of one checkpoint on one device, loaded once and copied for each run."""

    def __init__(self, checkpoint: Checkpoint, device: str, dropout: bool = True) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self._options = {} if dropout else no_dropout(checkpoint.config)
        self._pristine: dict[int, Any] = {}

    def fresh(self, task: Task, labels: int, seed: int, bias: float = 0.0) -> Any:
        """A copy of the pretrained model whose head is drawn by `seed`; its last bias starts at `bias`."""
        if labels not in self._pristine:
            problem = "regression" if task.kind == Regression.name else "single_label_classification"
            loaded = AutoModelForSequenceClassification.from_pretrained(
                self.checkpoint.folder,
                dtype=torch.float32,
                num_labels=labels,
                problem_type=problem,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                **self._options,
            )
            self._pristine[labels] = loaded.to(self.device)
        model = copy.deepcopy(self._pristine[labels])
        _draw_head(model, seed)
        start_bias(model, bias)
        return model

    def warmed(self, task: Task, labels: int, folder: Path) -> Any:
        """A copy with the weights of a warmed-up checkpoint."""
        model = self.fresh(task, labels, seed=0)
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors", device=self.device))
        return model


def _draw_head(model: Any, seed: int) -> None:
    """Draw what is outside the encoder afresh; a pretrained pooler inside it stays."""
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(model.config, "initializer_range", 0.02)
    inside = f"{model.base_model_prefix}."
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith(inside):
                drawn = torch.randn(module.weight.shape, generator=generator) * spread
                module.weight.copy_(drawn)
                module.bias.zero_()


def write_warmed(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    """Write a warmed-up model with its tokenizer, whole or not at all."""
    temporary = Path(tempfile.mkdtemp(prefix=".warm", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        checkpoint.tokenizer().save_pretrained(temporary)
        # Not flushed to the disk: it can be made again, and a run of minutes writes gigabytes of these.
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
