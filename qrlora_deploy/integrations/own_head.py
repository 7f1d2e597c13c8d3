"""A customer's own output layer in the place of a model's, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from qrlora_deploy.errors import MismatchError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.head import replace_head, set_head
from qrlora_deploy.models.model_config import CONFIG, is_encoder
from qrlora_deploy.models.output_names import output_names
from qrlora_deploy.tasks.base import TASK_FIELD
from qrlora_deploy.tasks.registry import writes_text

CHANGED = ("id2label", "label2id", "problem_type", TASK_FIELD)
"""What a customer's labels change in the config of a model in memory."""


@dataclass
class OwnHead:
    """What a customer's output layer replaced.

    Attributes:
        before: the model's own parameters, by tensor name.
        config: the config's entries under `CHANGED`, those that it had.
    """

    before: dict[str, nn.Parameter]
    config: dict[str, Any]

    @classmethod
    def put_in(cls, model: Any, customer: Coefficients) -> Self:
        """Replace a model's output layer and labels by those of a customer that `check_head` has accepted."""
        config = {name: getattr(model.config, name) for name in CHANGED if hasattr(model.config, name)}
        return cls(replace_head(model, customer), config)

    def take_out(self, model: Any) -> None:
        """Put the model's own back, on the device and in the dtype that the model has by now."""
        for name, parameter in self.before.items():
            parameter.data = parameter.data.to(model.get_parameter(name))
        set_head(model, self.before)
        for name in CHANGED:
            if name in self.config:
                setattr(model.config, name, self.config[name])
            elif hasattr(model.config, name):
                delattr(model.config, name)


def check_head(model: Any, customer: Coefficients, own: OwnHead | None) -> None:
    """Make sure that a customer's output layer, or the model's for its labels, can answer.

    Args:
        model: with its own output layer, or another customer's.
        customer: to be loaded.
        own: what that other customer's layer replaced.

    Raises:
        MismatchError: it cannot, and why.
    """
    if customer.head:
        _check_shapes(model, customer)
        return
    labels = labels_of(model) if own is None else output_names(Path(CONFIG), own.config["id2label"])
    if labels != customer.labels:
        raise MismatchError(
            f"the customer uses the base's head, whose {len(customer.labels)} labels are not the {len(labels)} of the "
            f"model; load the model from the customer's base"
        )


def _check_shapes(model: nn.Module, customer: Coefficients) -> None:
    rows = {len(values) for values in customer.head.values()}
    if rows != {len(customer.labels)}:
        raise MismatchError(f"the customer has {len(customer.labels)} labels, and a head for {sorted(rows)}")
    there = dict(model.named_parameters())
    for name, values in customer.head.items():
        if name not in there:
            raise MismatchError(f"the model has no tensor {name}, which the customer's head replaces")
        if tuple(there[name].shape[1:]) != values.shape[1:]:
            raise MismatchError(
                f"{name} is {list(there[name].shape)} in the model, and the customer's {list(values.shape)}"
            )


def labels_of(model: Any) -> tuple[str, ...]:
    """Names of the outputs of a model in memory, in their order; none of a decoder, or an encoder without a head."""
    if is_encoder(type(model).__name__) or writes_text(type(model).__name__):
        return ()
    return output_names(Path(CONFIG), model.config.id2label)
