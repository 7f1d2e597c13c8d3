"""Which outputs a run has: the base's own, or a new set of labels with a new output layer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.labels import quoted
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.targets import BLOCK
from qrlora_deploy.tasks.tasks import CHOICES, CLASSIFICATION, REGRESSION, choose_task, encode_labels, label_names


@dataclass(frozen=True)
class Outputs:
    """What the model answers.

    Attributes:
        task: "text-classification" or "text-regression".
        labels: names of the outputs, in their order.
        new: whether the output layer starts afresh instead of with the base's weights.
        bias: where the bias of a new output layer starts: the mean of the training labels of a regression.
            From 0 every row's first gradient says "more", and the encoder follows until all texts look alike.
        remark: what a user may not expect: why it is a regression, or that a trained head is replaced; else empty.
    """

    task: str
    labels: tuple[str, ...]
    new: bool
    bias: float = 0.0
    remark: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for a model with these outputs."""
        problem = "regression" if self.task == REGRESSION else "single_label_classification"
        if not self.new:
            return {"problem_type": problem}
        return {
            "problem_type": problem,
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "ignore_mismatched_sizes": True,
        }


def base_outputs(checkpoint: Checkpoint) -> Outputs:
    """The outputs of the base as it is.

    Raises:
        InputError: it has no head, or one that this project does not train.
    """
    checkpoint.require_task_head()
    return Outputs(checkpoint.task, checkpoint.labels, new=False)


def frozen_outputs(checkpoint: Checkpoint, wanted: str) -> Outputs:
    """The outputs of the base as it is, where its head stays.

    Args:
        checkpoint: the base.
        wanted: "auto", or the task that the head must have.

    Raises:
        InputError: as `base_outputs`, or the head has another task.
    """
    base = base_outputs(checkpoint)
    if CHOICES.get(wanted, base.task) != base.task:
        raise InputError(
            f"--task {wanted}: the head of {checkpoint.name} is for {base.task}; give the base another one by "
            f"`warmup`, or train one by --head output"
        )
    return base


def own_outputs(checkpoint: Checkpoint, examples: Examples, wanted: str = "auto") -> Outputs:
    """The base's outputs where they serve for the labels of `examples`, else a new set.

    Args:
        checkpoint: the base.
        examples: the training data.
        wanted: "auto", "classification" or "regression".

    Raises:
        InputError: the labels are all the same, or it is not clear what they are.
    """
    replaced = ""
    if checkpoint.has_task_head:
        base = base_outputs(checkpoint)
        if CHOICES.get(wanted, base.task) == base.task:
            try:
                encode_labels(examples, base.task, base.labels)
                return base
            except InputError:
                pass  # other labels than the base's: a new set
        replaced = f"a new head replaces the base's for {quoted(base.labels, 4)}"
    guess = choose_task(examples, wanted)
    remark = "; ".join(filter(None, (replaced, f"a regression: {guess.reason}" if guess.reason else "")))
    if guess.task == REGRESSION:
        mean = float(np.mean(encode_labels(examples, REGRESSION, ("score",))))
        return Outputs(REGRESSION, ("score",), new=True, bias=mean, remark=remark)
    labels = label_names(examples.labels)
    if len(labels) < 2:
        raise InputError(f"{examples.name}: every row has the label {labels[0]}; a classifier needs two or more")
    return Outputs(CLASSIFICATION, labels, new=True, remark=remark)


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
        raise InputError(f"{type(model).__name__} has no linear output layer; use --head frozen")
    return found[-1]


def check_not_adapted(name: str, basis: Basis) -> None:
    """Make sure that an output layer may be trained.

    Raises:
        InputError: the basis adapts that layer already.
    """
    if name in basis.names:
        raise InputError(f"the basis adapts the output layer {name} already; use --head frozen")


def check_stored(names: Iterable[str], checkpoint: Checkpoint) -> None:
    """Make sure that a base holds the tensors of its output layer.

    Raises:
        InputError: it does not; they are named.
    """
    missing = [name for name in names if name not in checkpoint.tensor_files]
    if missing:
        raise InputError(f"{checkpoint.name} holds no tensor {', '.join(missing)}; use --head frozen")


def draw_weight(shape: tuple[int, ...], config: Any, seed: int) -> torch.Tensor:
    """A new output layer's weight `[labels, width]` fp32, as widely spread as the model's own beginnings."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * float(getattr(config, "initializer_range", 0.02))


def start_bias(model: Any, bias: float) -> None:
    """Set the bias of the output layer, where it has one, to `Outputs.bias`."""
    layer = model.get_submodule(output_layer(model))
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.fill_(bias)


def prepare_head(model: Any, outputs: Outputs, basis: Basis, seed: int) -> dict[str, nn.Parameter]:
    """The output layer's parameters by tensor name, newly drawn where the labels are new.

    Raises:
        InputError: the basis adapts that layer already.
    """
    name = output_layer(model)
    check_not_adapted(name, basis)
    layer = model.get_submodule(name)
    if outputs.new:
        # Drawn here and not by transformers: as many labels as before would keep the base's weights.
        with torch.no_grad():
            layer.weight.copy_(draw_weight(tuple(layer.weight.shape), model.config, seed))
        start_bias(model, outputs.bias)
    return {f"{name}.{part}": parameter for part, parameter in layer.named_parameters()}
