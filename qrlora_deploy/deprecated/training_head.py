"""`qrlora_deploy.training.head` as it was: outputs of a run, and the output layer of a model."""

from qrlora_deploy.models.head import (
    check_not_adapted,
    check_stored,
    draw_weight,
    output_layer,
    prepare_head,
    start_bias,
)
from qrlora_deploy.training.outputs import Outputs, base_outputs, frozen_outputs, own_outputs

__all__ = [
    "Outputs",
    "base_outputs",
    "check_not_adapted",
    "check_stored",
    "draw_weight",
    "frozen_outputs",
    "output_layer",
    "own_outputs",
    "prepare_head",
    "start_bias",
]
