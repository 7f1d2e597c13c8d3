"""A customer in a PyTorch model that the caller has loaded, and coefficients for the caller's own training loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from qrlora_deploy.api.inputs import StrPath, as_basis, as_coefficients
from qrlora_deploy.api.sources import as_checkpoint
from qrlora_deploy.errors import BasisMismatchError, InputError, MismatchError, QrloraError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.integrations.own_head import OwnHead, check_head, labels_of
from qrlora_deploy.models.adapter import (
    QRLoRALinear,
    detach,
    get_coefficients,
    insert,
    precondition,
    resolve_layer,
    set_coefficients,
)
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.head import check_stored, prepare_head
from qrlora_deploy.models.targets import is_conv1d
from qrlora_deploy.models.task_head import task_of
from qrlora_deploy.training.outputs import taken_for

Model = TypeVar("Model", bound=nn.Module)

STATE = "_qrlora"
"""Attribute of a model that has side branches."""

DEVIATION = {torch.float16: 2e-2, torch.bfloat16: 2e-2}
WIDE_DEVIATION = 2e-3
"""Largest `||Q^T W - R|| / ||R||` of the weight that was factorized, by the dtype in memory. Another one: near 1."""


@dataclass
class _Attached:
    """What is known of a model's side branches.

    Attributes:
        basis: whose targets have them.
        trainable: names of the parameters that could be trained before.
        trained_head: tensor names of the output layer where it is trained too.
        own_head: the customer's output layer in the place of the model's; None where the model has its own.
    """

    basis: Basis
    trainable: frozenset[str]
    trained_head: tuple[str, ...] = ()
    own_head: OwnHead | None = None
    adapters: dict[str, QRLoRALinear] = field(default_factory=dict)


def attach(model: Model, basis: StrPath | Basis, *, head: str = "frozen") -> Model:
    """Give a model trainable coefficients, for a training loop of your own; everything else is frozen.

    The new parameters are called `<layer>.u [rank]` fp32 and start at zero, where the model answers as before. The
    coefficients are `c = scale * u` with a fixed `scale`, which lets one learning rate serve all of them;
    `default_rate(basis.total_rank, layers=len(basis.targets), steps=...)` is the one that `train` takes, with Adam and
    no weight decay.

    Args:
        model: a text classifier of transformers, loaded from the basis's base; on any device and in any dtype.
        basis: a file or a `Basis`.
        head: "frozen", or "output": the last projection is trained too.

    Returns:
        The same model, changed in place. `coefficients_of` takes the customer out again.

    Raises:
        InputError: a layer of the basis is missing or no linear layer, there is no such head, or the model has side
            branches already. The model is not changed then.
        BasisMismatchError: the basis was made from other weights than the model's.

    Examples:
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("base")
        >>> model = qr.attach(model, "basis.safetensors")
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad][0]
        'bert.encoder.layer.0.attention.self.query.u'
        >>> customer = qr.coefficients_of(model)
    """
    frozen = as_basis(basis)
    if head not in ("frozen", "output"):
        raise InputError(f"head must be frozen or output, not {head}")
    if _state_of(model) is not None:
        raise InputError("the model has side branches already; take them out by remove_customer first")
    check_weights(model, frozen)
    layer = prepare_head(model, frozen, None, 0) if head == "output" else {}
    state = _put_branches(model, frozen)
    precondition(state.adapters)
    model.requires_grad_(False)
    for parameter in [adapter.u for adapter in state.adapters.values()] + list(layer.values()):
        parameter.requires_grad_(True)
    state.trained_head = tuple(layer)
    return model


def coefficients_of(
    model: nn.Module,
    *,
    base: StrPath | Checkpoint | None = None,
    training: Mapping[str, Any] | None = None,
    task: str = "auto",
) -> Coefficients:
    """Take a customer out of a model with side branches; the model is not changed.

    Args:
        model: after `attach` or `load_customer`; may be wrapped, as for several GPUs.
        base: folder or hub name that the model was loaded from; None: the one that its config names.
        training: what the customer's file shall say of its training, plain JSON values.
        task: what the model was trained for where its config leaves that open: "embedding", or "reranker".

    Returns:
        The customer: values `[total_rank]` fp32, and its output layer where that was trained; `save` writes it.

    Raises:
        InputError: the model has no side branches, other parameters were trained too, or the base is not found.
        BasisMismatchError: the basis was made from other weights than the base's.
        QrloraError: training diverged: a coefficient is NaN or Inf.
    """
    state = _state_of(model)
    if state is None:
        raise InputError("the model has no side branches; give it some by attach first")
    inner: Any = _inner(model)
    _check_nothing_else(inner, state)
    checkpoint = taken_for(as_checkpoint(_name_of(inner) if base is None else base), task)
    check_basis_fits(checkpoint, state.basis)
    head = _head_of(inner, state, checkpoint)
    values = get_coefficients(state.adapters)
    if not all(np.isfinite(array).all() for array in (values, *head.values())):
        raise QrloraError("training diverged: a coefficient is NaN or Inf; try a smaller learning rate")
    labels = labels_of(inner) if head else checkpoint.labels
    task = task_of(inner.config, type(inner).__name__, len(labels), "") if head else checkpoint.task
    return Coefficients(
        values=values,
        basis_digest=state.basis.digest,
        base_name=checkpoint.name,
        base_digest=checkpoint.digest,
        task=task,
        labels=labels,
        head=head,
        basis_file=str(state.basis.file or ""),
        training=dict(training or {}),
    )


def load_customer(model: Model, basis: StrPath | Basis, coefficients: StrPath | Coefficients) -> Model:
    """Make a model answer as a customer: side branches `Q (c * (R x))` beside its layers, and the customer's own head.

    A customer that is there already makes room, at the price of writing `total_rank` numbers. What could be trained
    before still can; after `attach` the coefficients can too, so training goes on from this customer.

    Args:
        model: a text classifier of transformers, loaded from the base; on any device and in any dtype.
        basis: a file or a `Basis`.
        coefficients: a file or `Coefficients`.

    Returns:
        The same model, changed in place.

    Raises:
        InputError: a layer of the basis is missing, or the customer's head or labels do not fit the model, which is
            not changed then.
        BasisMismatchError: model, basis and customer do not belong together.

    Examples:
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("base")
        >>> model = qr.load_customer(model, "basis.safetensors", "customers/acme.safetensors")
        >>> model = qr.remove_customer(model)
    """
    frozen, customer = as_basis(basis), as_coefficients(coefficients)
    customer.check_fits(frozen)
    state = _state_of(model)
    if state is not None and state.basis.digest != frozen.digest:
        raise BasisMismatchError(
            f"the model has side branches of basis {state.basis.digest[:12]}, and the customer is of "
            f"{frozen.digest[:12]}; take them out by remove_customer first"
        )
    inner = _inner(model)
    if state is not None and state.trained_head and customer.labels != labels_of(inner):
        raise MismatchError("the model's own output layer is trained, and the customer has other labels")
    own = state.own_head if state else None
    check_head(inner, customer, own)
    if state is None:
        check_weights(inner, frozen)
        state = _put_branches(inner, frozen)
    if own is not None:
        own.take_out(inner)
    state.own_head = OwnHead.put_in(inner, customer) if customer.head else None
    set_coefficients(state.adapters, frozen, customer.values)
    return model


def remove_customer(model: Model) -> Model:
    """Take side branches and a customer's own head out again: the model answers as its base.

    Layers, head, labels and what can be trained are as they were before `load_customer` or `attach`; an output layer
    that was trained stays trained.

    Args:
        model: may have none, and stays as it is then.

    Returns:
        The same model.
    """
    state = _state_of(model)
    if state is None:
        return model
    inner = _inner(model)
    if state.own_head is not None:
        state.own_head.take_out(inner)
    detach(inner)
    delattr(inner, STATE)
    for name, parameter in inner.named_parameters():
        parameter.requires_grad_(name in state.trainable)
    return model


def check_weights(model: nn.Module, basis: Basis) -> None:
    """Make sure that a basis was made from the weights of a model in memory, in whatever dtype they are there.

    The kept rows of a QR with column pivoting are `R = Q^T W`, so no file is needed.

    Raises:
        InputError: the model lacks a layer.
        BasisMismatchError: some weights differ; all of them are counted, the first ones named.
    """
    wrong = []
    for target in basis.targets:
        path, layer = resolve_layer(model, target.name)
        stored = layer.get_parameter("weight").detach()
        weight = (stored.T if is_conv1d(layer) else stored).float()
        if tuple(weight.shape) != (target.q.shape[0], target.r.shape[1]):
            wrong.append(path)
            continue
        r = torch.tensor(target.r, device=weight.device)
        distance = (torch.tensor(target.q, device=weight.device).T @ weight - r).norm()
        if not distance <= DEVIATION.get(stored.dtype, WIDE_DEVIATION) * r.norm():
            wrong.append(path)
    if wrong:
        raise BasisMismatchError(
            f"the basis was made from other weights than the model's: {len(wrong)} of {len(basis.targets)} targets "
            f"differ ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})"
        )


def _inner(model: nn.Module) -> nn.Module:
    """The model with side branches inside of a wrapper; the model itself where there are none."""
    return next((module for module in model.modules() if STATE in vars(module)), model)


def _state_of(model: nn.Module) -> _Attached | None:
    return vars(_inner(model)).get(STATE)


def _put_branches(model: nn.Module, basis: Basis) -> _Attached:
    state = _Attached(basis, frozenset(name for name, item in model.named_parameters() if item.requires_grad))
    state.adapters = insert(model, basis)
    for adapter in state.adapters.values():
        adapter.u.requires_grad_(False)
    setattr(model, STATE, state)
    return state


def _check_nothing_else(model: nn.Module, state: _Attached) -> None:
    own = {id(adapter.u) for adapter in state.adapters.values()}
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own and name not in state.trained_head
    ]
    # After `load_customer` alone nobody trains the coefficients, and what else is free is the caller's affair.
    if others and any(adapter.u.requires_grad for adapter in state.adapters.values()):
        raise InputError(
            f"{len(others)} other parameters can be trained too, such as {others[0]}, which no customer holds; "
            f"freeze them, and start again from the base's"
        )


def _name_of(model: nn.Module) -> str:
    name = str(getattr(model, "name_or_path", ""))
    if not name:
        raise InputError("base: the model's config names none; give the folder or hub name that it was loaded from")
    return name


def _head_of(model: nn.Module, state: _Attached, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    names = state.trained_head or (tuple(state.own_head.before) if state.own_head else ())
    check_stored(names, checkpoint)
    return {name: model.get_parameter(name).detach().float().cpu().numpy().copy() for name in names}
