"""The base in PyTorch as any customer: side branches beside the layers of the one model that is exported later.

The model is lent: while the branches are attached it answers as customers, and afterwards it is the base again, to the
bit, since its own weights are never changed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from exporters.onnx.lower_blocks import LowerBlocks
from exporters.onnx.prepared import Prepared
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.merging.arithmetic import check_head, plan_folds
from qrlora_deploy.models.adapter import QRLoRALinear, attach, detach, set_coefficients
from qrlora_deploy.models.head import set_head
from qrlora_deploy.models.loading import quiet_transformers
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.classification import Classification

Inputs = dict[str, np.ndarray]

CLASSES = Classification()


class SideBranches:
    """One model that answers as any customer; made by `side_branches`.

    Args:
        prepared: the base.
        basis: made from it.
        adapters: attached to the model of `prepared`, by target.
        lower: keeps what the model's blocks below them answer.
    """

    def __init__(self, prepared: Prepared, basis: Basis, adapters: dict[str, QRLoRALinear], lower: LowerBlocks) -> None:
        self.prepared, self.basis = prepared, basis
        self._adapters, self._lower = adapters, lower
        self._own_head: dict[str, nn.Parameter] = {}

    def check(self, customer: Coefficients) -> None:
        """Make sure that a customer belongs to this base.

        Raises:
            InputError: the base is merged already, or the customer's head does not fit it, and others of `merge_model`.
            BasisMismatchError: base, basis and customer do not belong together.
        """
        checkpoint = self.prepared.checkpoint
        plan_folds(checkpoint, self.basis, customer, checkpoint.skeleton())
        check_head(checkpoint, customer)

    def answers(self, customer: Coefficients, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """Logits of a customer and of the base; both by the customer's own head where it has one,
        so that their difference is the effect of `c` alone."""
        self.use_head(customer.head)
        base = self.logits(np.zeros_like(customer.values), inputs)
        return (self.logits(customer.values, inputs) if customer.values.any() else base), base

    def logits(self, values: np.ndarray, inputs: Inputs) -> np.ndarray:
        """Logits with coefficients `values [total_rank]`, by the head that was used last.

        Further runs on the very same `inputs` compute what is adapted and what follows, no more.
        """
        set_coefficients(self._adapters, self.basis, values)
        self._lower.begin(inputs)
        return model_logits(self.prepared.model, inputs, self.prepared.task)

    def use_head(self, head: Mapping[str, np.ndarray]) -> None:
        """Take a customer's own output layer; an empty one: the base's."""
        model = self.prepared.model
        for name in head.keys() - self._own_head.keys():
            self._own_head[name] = model.get_parameter(name)
        own = {name: nn.Parameter(torch.from_numpy(array)) for name, array in head.items()}
        set_head(model, own or self._own_head)


@contextmanager
def side_branches(prepared: Prepared, basis: Basis) -> Iterator[SideBranches]:
    """Lend the model of `prepared` for answers by side branches; afterwards it is as it was.

    Raises:
        InputError: the model has no such layers. BasisMismatchError: their shapes differ.
    """
    model = prepared.model
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with _plain_attention(model):
        adapters, lower = attach(model, basis), LowerBlocks()
        side = SideBranches(prepared, basis, adapters, lower)
        try:
            with lower.within(model, adapters.values()):
                yield side
        finally:
            side.use_head({})
            detach(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trainable)


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """The plainest attention there is, so that no fused kernel is on both sides of the comparison."""
    before = model.config._attn_implementation
    with quiet_transformers():
        # A model that chose its attention when it was made stays with it (BERT before transformers 5).
        model.set_attn_implementation("eager")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        with quiet_transformers():
            model.set_attn_implementation(before)


def model_logits(model: Any, inputs: Inputs, task: Task = CLASSES) -> np.ndarray:
    """Answers of a PyTorch model in fp32: logits `[batch, outputs]` or `[batch, length, outputs]`, or embeddings."""
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        logits: np.ndarray = task.forward(model, tensors).float().numpy()
    return logits
