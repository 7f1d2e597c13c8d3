"""Customers of a decoder whose answers are labels: how often each finds the right one likeliest."""

import torch

from qrlora_deploy.tasks.causal_lm import CausalLM
from qrlora_deploy.training.batches import collator_for
from qrlora_deploy.training.fleet.model import FleetModel
from qrlora_deploy.training.fleet.shipping import ship
from qrlora_deploy.training.fleet.tokens import LABELS
from qrlora_deploy.training.label_likelihoods import LabelRows
from qrlora_deploy.training.rows import Rows

BATCH = 32
"""Rows at a time: those of one customer, whose prompt comes with every label, are about as long."""


def score_labels(model: FleetModel, slot: int, rows: LabelRows | None) -> dict[str, float]:
    """As `LabelRows.score`, of the customer in a slot; nothing where its answers are no labels."""
    if rows is None:
        return {}
    collate = collator_for(CausalLM(), model.tokenizer)

    def graded(part: Rows) -> torch.Tensor:
        places = torch.arange(len(part), device=model.device)
        model.give(torch.full_like(places, slot), places, len(part))
        batch = {name: ship(tensor, model.device) for name, tensor in collate(part).items()}
        targets = batch.pop(LABELS)
        with model.precision(training=False):
            return CausalLM().graded(model.model, batch, targets)

    return rows.score_by(graded, BATCH)
