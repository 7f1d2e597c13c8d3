"""The output layer of a model: where it is, and how a new one starts."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.formats.config_file import THRESHOLDS_KEY
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.targets import BLOCK
from qrlora_deploy.tasks.registry import task_named


def output_layer(model: Any) -> str:
    """Module path of the last linear layer outside the blocks with one output per label.

    Raises:
        InputError: there is none.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and not BLOCK.search(f".{name}.")
    ]
    if not found:
        raise InputError(f"{type(model).__name__} has no linear output layer; use {argument('head', 'frozen')}")
    return found[-1]


def check_not_adapted(name: str, basis: Basis) -> None:
    """Make sure that an output layer may be trained.

    Raises:
        InputError: the basis adapts that layer already.
    """
    if name in basis.names:
        raise InputError(f"the basis adapts the output layer {name} already; use {argument('head', 'frozen')}")


def check_stored(names: Iterable[str], checkpoint: Checkpoint) -> None:
    """Make sure that a base holds the tensors of its output layer.

    Raises:
        InputError: it does not; they are named.
    """
    missing = [name for name in names if name not in checkpoint.tensor_files]
    if missing:
        raise InputError(f"{checkpoint.name} holds no tensor {', '.join(missing)}; use {argument('head', 'frozen')}")


def draw_weight(shape: tuple[int, ...], config: Any, seed: int) -> torch.Tensor:
    """A new output layer's weight `[labels, width]` fp32, as widely spread as the model's own beginnings."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * float(getattr(config, "initializer_range", 0.02))


def start_bias(model: Any, bias: float) -> None:
    """Set every bias of the output layer, where it has them, to `bias`."""
    layer = model.get_submodule(output_layer(model))
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.fill_(bias)


def prepare_head(model: Any, basis: Basis, new_bias: float | None, seed: int) -> dict[str, nn.Parameter]:
    """The output layer's parameters by tensor name.

    Args:
        model: with as many outputs as are wanted.
        basis: of its adapted layers.
        new_bias: where every bias of a newly drawn layer starts; None: the layer stays the base's.
        seed: of a newly drawn layer.

    Raises:
        InputError: the basis adapts that layer already.
    """
    name = output_layer(model)
    check_not_adapted(name, basis)
    layer = model.get_submodule(name)
    if new_bias is not None:
        # Drawn here and not by transformers: as many labels as before would keep the base's weights.
        with torch.no_grad():
            layer.weight.copy_(draw_weight(tuple(layer.weight.shape), model.config, seed))
        start_bias(model, new_bias)
    return {f"{name}.{part}": parameter for part, parameter in layer.named_parameters()}


def replace_head(model: Any, customer: Coefficients) -> dict[str, nn.Parameter]:
    """Put a customer's own output layer, of as many outputs as it has, and its labels in the place of a model's.

    Args:
        model: has tensors of the names of the customer's.
        customer: has a head, `[outputs, ...]` each.

    Returns:
        The model's own parameters, by tensor name.
    """
    before = {name: model.get_parameter(name) for name in customer.head}
    values = {name: torch.from_numpy(array).to(before[name], copy=True) for name, array in customer.head.items()}
    set_head(model, {name: nn.Parameter(value, before[name].requires_grad) for name, value in values.items()})
    model.config.update(task_named(customer.task).config_fields)
    if customer.labels:
        model.config.id2label = dict(enumerate(customer.labels))
        model.config.label2id = {label: index for index, label in enumerate(customer.labels)}
    return before


def set_thresholds(config: Any, thresholds: Sequence[float]) -> None:
    """Let a model's config say from which probability on each label applies; nothing where there are no thresholds,
    also nothing that an earlier head has left there."""
    if thresholds:
        setattr(config, THRESHOLDS_KEY, list(thresholds))
    elif hasattr(config, THRESHOLDS_KEY):
        delattr(config, THRESHOLDS_KEY)


def set_head(model: Any, head: dict[str, nn.Parameter]) -> None:
    """Put parameters of an output layer, `[outputs, ...]` each, in the place of a model's."""
    for name, parameter in head.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, attribute, parameter)
        if isinstance(module, nn.Linear):
            module.out_features = len(parameter)
        model.num_labels = len(parameter)
