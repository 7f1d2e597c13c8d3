"""Training that goes on from a customer, such as one that was projected or trained on less data."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qrlora_deploy.errors import BasisMismatchError, InputError, argument
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.adapter import QRLoRALinear, set_coefficients
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.training.outputs import Outputs


def check_start(start: Coefficients, checkpoint: Checkpoint, basis: Basis, outputs: Outputs, head: str) -> None:
    """Make sure that training can go on from a customer.

    Args:
        start: the customer.
        checkpoint: the base.
        basis: of the base.
        outputs: what the model is to answer.
        head: "frozen" or "output", as in `TrainSettings`.

    Raises:
        BasisMismatchError: it is of another basis or base.
        InputError: it is of another task or has other labels, or has an output layer that would be dropped.
    """
    try:
        start.check_fits(basis)
    except InputError as error:
        raise type(error)(f"{argument('start')}: {error}") from error
    if start.base_digest != checkpoint.digest:
        raise BasisMismatchError(
            f"{argument('start')} is a customer of base {start.base_digest[:12]}, but {checkpoint.name} is "
            f"{checkpoint.digest[:12]}"
        )
    if start.task != outputs.task.name:
        raise InputError(f"{argument('start')} is a customer for {start.task}, the data is for {outputs.task.name}")
    if start.head and head == "frozen":
        raise InputError(f"{argument('start')} has its own output layer; train it by {argument('head', 'output')}")
    if start.labels != outputs.labels and (start.head or head == "frozen"):
        raise InputError(f"{argument('start')} has other labels than the data; its output layer is of no use for them")


def begin_from(
    start: Coefficients, basis: Basis, adapters: dict[str, QRLoRALinear], head: Mapping[str, nn.Parameter]
) -> None:
    """Write a customer's coefficients and, where it has one, its output layer into a model that is ready to train."""
    set_coefficients(adapters, basis, start.values)
    with torch.no_grad():
        for name, values in start.head.items():
            head[name].copy_(torch.from_numpy(values))


def start_record(start: Coefficients | None) -> dict[str, Any]:
    """What a run's mark and a training record say of where it began; nothing where it began at the base."""
    return {} if start is None else {"start_digest": start.digest}
