"""The methods that are compared: what each trains, at which learning rate, and what a customer ships."""

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, TinyLoraConfig, VeraConfig, get_peft_model
from torch import nn

from benchmarks.common.layers import TAU, targets_of
from qrlora_deploy.errors import InputError
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.models.adapter import QRLoRALinear, attach, get_coefficients, precondition
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.training.settings import default_rate

HEAD_RATE = 1e-3
"""Of a head that trains beside an adapter, as `train --head output` has it."""

STEPS_FACTOR = 12.3
"""Over the square root of the steps: what the rate by the number of coefficients is multiplied by; see
docs/preconditioning.md."""

Projections = tuple[str, ...]
"""Of "query" and "value"; none means every linear layer of every block."""


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Attributes:
        name: on the command line and in the records.
        title: in the table.
        rate: peak learning rate, the same for every task and model; None is that by the number of
            coefficients, the default of `train` in short runs.
        kind: "full", "head", "qr", or a key of `PEFT_CONFIGS`.
        projections: which layers get an adapter.
        last_layers: only of the last N blocks; None is all of them.
        rate_factor: of the rate by the number of coefficients, to see how much depends on it.
        tau: share of energy that a basis keeps.
        budget: instead of `tau`: how many directions all layers have together, the same number in each.
        measured: whether a step's effect is measured instead of training.
        by_steps: whether the rate also falls with the square root of the steps, by `STEPS_FACTOR`.
        bounded: whether it is the one that `train` takes, which layers and steps bound.
    """

    name: str
    title: str
    rate: float | None
    kind: str
    projections: Projections = ("query", "value")
    last_layers: int | None = None
    rate_factor: float = 1.0
    tau: float = TAU
    budget: int | None = None
    measured: bool = False
    by_steps: bool = False
    bounded: bool = False

    def rate_of(self, basis: Basis, steps: int) -> float:
        """The peak learning rate of QR-LoRA's coefficients in a run of so many steps."""
        if self.bounded:
            return default_rate(basis.total_rank, 1.0, len(basis.targets), steps)
        by_count = self.rate_factor * default_rate(basis.total_rank)
        return by_count * STEPS_FACTOR / math.sqrt(steps) if self.by_steps else by_count


METHODS = {
    method.name: method
    for method in (
        Method("full", "full fine-tuning", 3e-5, "full"),
        Method("head", "head only", HEAD_RATE, "head"),
        Method("lora", "LoRA, r = 8, q and v (PEFT)", 5e-4, "lora"),
        Method("pissa", "PiSSA, r = 8, q and v (PEFT)", 5e-4, "pissa"),
        Method("vera", "VeRA, r = 256, q and v (PEFT)", 1e-2, "vera"),
        Method("tinylora", "TinyLoRA, r = 2, u = 64, q and v (PEFT)", 2e-3, "tinylora"),
        Method("qr-q4", "QR-LoRA, q of the last 4", None, "qr", ("query",), 4),
        Method("qr-qv4", "QR-LoRA, q and v of the last 4", None, "qr", ("query", "value"), 4),
        Method("qr-all", "QR-LoRA, all linear layers", None, "qr", ()),
        Method("qr-all-half", "the same at half the rate by count", None, "qr", (), rate_factor=1 / 2),
        Method("qr-all-quarter", "the same at a quarter of it", None, "qr", (), rate_factor=1 / 4),
    )
}

PLACEMENTS = {
    method.name: method
    for method in (
        *(METHODS[name] for name in ("qr-q4", "qr-all")),
        Method("qr-even-300", "QR-LoRA, 300 over all linear layers", None, "qr", (), budget=300),
        Method("qr-even-640", "QR-LoRA, 640 over all linear layers", None, "qr", (), budget=640),
        Method("qr-even-3000", "QR-LoRA, 3,000 over all linear layers", None, "qr", (), budget=3000),
        Method("qr-tau95", "QR-LoRA, tau 0.95, all linear layers", None, "qr", (), tau=0.95),
    )
}
"""Where coefficients are, to see which rate suits each; see `method_named`."""


def method_named(name: str) -> Method:
    """A method, or a placement at a part of its rate ("qr-q4@0.25"), at one that follows the steps too
    ("qr-q4@steps"), at the one of `train` ("qr-q4@train"), or with a step's effect measured instead of training
    ("qr-q4@measure").

    Raises:
        InputError: there is no such method.
    """
    found, _, way = name.partition("@")
    method = (METHODS | PLACEMENTS).get(found)
    if method is None:
        raise InputError(f"{name}: no such method; there are {', '.join(METHODS | PLACEMENTS)}")
    if way == "measure":
        return replace(method, name=name, measured=True)
    if way == "steps":
        return replace(method, name=name, by_steps=True)
    if way == "train":
        return replace(method, name=name, bounded=True)
    return replace(method, name=name, rate_factor=float(way)) if way else method


COMPARED = [name for name, method in METHODS.items() if method.rate_factor == 1.0]
"""The methods, each at its own rate; the others show what another rate would have given."""

PEFT_CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    "lora": lambda names: LoraConfig(r=8, lora_alpha=16, target_modules=names),
    # Its factors are those of the weight itself, so they are not scaled.
    "pissa": lambda names: LoraConfig(r=8, lora_alpha=8, target_modules=names, init_lora_weights="pissa"),
    "vera": lambda names: VeraConfig(r=256, target_modules=names),
    "tinylora": lambda names: TinyLoraConfig(r=2, u=64, target_modules=names),
}


@dataclass(frozen=True)
class Prepared:
    """A model ready to train.

    Attributes:
        model: what is called.
        groups: `params` and `lr` for the optimiser.
        rate: the peak learning rate of what the method adds, or of what it trains.
        trainable: number of trained parameters.
        file_bytes: writes what a customer ships, after training, and says how large it is.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    rate: float
    trainable: int
    file_bytes: Callable[[], int]


def head_names(model: Any) -> list[str]:
    """Parameters of the head: what is outside the encoder, and the pooler before it."""
    inside = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if not name.startswith(inside) or "pooler" in name.split(".")]


def prepare(
    method: Method,
    model: Any,
    start: Checkpoint,
    train_head: bool,
    labels: tuple[str, ...],
    steps: int,
) -> Prepared:
    """Freeze `model`, add what the method trains, and say how to write it.

    Args:
        method: the method.
        model: with the weights of `start`, on its device; changed in place.
        start: the checkpoint with these weights, which the basis of a QR method is made from.
        train_head: whether an adapter has the head trained along.
        labels: names of the outputs, for the coefficients file.
        steps: of the optimiser, on which a rate may depend.

    Raises:
        InputError: a layer is missing.
    """
    device = next(model.parameters()).device.type
    head = {name: model.get_parameter(name) for name in head_names(model)}
    if method.kind in ("full", "head"):
        model.requires_grad_(method.kind == "full")
        for parameter in head.values():
            parameter.requires_grad_(True)
        trained = dict(model.named_parameters()) if method.kind == "full" else head
        return _prepared(model, {}, trained, _given(method), lambda: _tensor_bytes(trained))
    if method.kind == "qr":
        basis = make_basis(method, start, device)
        adapters = attach(model, basis)
        precondition(adapters)
        parameters = {name: adapter.u for name, adapter in adapters.items()}
        along = _along(head, train_head)
        write = _writer(adapters, basis, along, labels, start)
        rate = method.rate_of(basis, steps)
        return _prepared(model, parameters, along, rate, write)
    names = targets_of(model, method.projections, method.last_layers)
    # PEFT makes its shared projections on the CPU, and some methods would copy them over in every step.
    wrapped = get_peft_model(model, PEFT_CONFIGS[method.kind](names)).to(device)
    parameters = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    # PiSSA changes the base: its adapter means something only beside the factors it started from.
    before = copy.deepcopy(parameters) if method.kind == "pissa" else {}
    along = _along(head, train_head)
    whole = parameters | {f"{name}.start": value for name, value in before.items()} | along
    return _prepared(wrapped.get_base_model(), parameters, along, _given(method), lambda: _tensor_bytes(whole))


def make_basis(method: Method, start: Checkpoint, device: str) -> Basis:
    """The basis of a QR method, from the weights it starts with."""
    names = targets_of(start.skeleton(), method.projections, method.last_layers)
    rule = FixedRank(max(1, round(method.budget / len(names)))) if method.budget else EnergyShare(method.tau)
    return factorize(start, names, rule, device)


def _given(method: Method) -> float:
    if method.rate is None:
        raise InputError(f"{method.name} has no learning rate; only QR-LoRA's follows from its coefficients")
    return method.rate


def _along(head: dict[str, nn.Parameter], train_head: bool) -> dict[str, nn.Parameter]:
    if not train_head:
        return {}
    for parameter in head.values():
        parameter.requires_grad_(True)
    return head


def _prepared(
    model: Any,
    adapter: dict[str, nn.Parameter],
    head: dict[str, nn.Parameter],
    rate: float,
    file_bytes: Callable[[], int],
) -> Prepared:
    """Without an adapter, what is in `head` trains at the method's own rate."""
    groups: list[dict[str, Any]] = [{"params": list(adapter.values()), "lr": rate}] if adapter else []
    if head:
        groups.append({"params": list(head.values()), "lr": HEAD_RATE if adapter else rate})
    trainable = sum(parameter.numel() for parameter in [*adapter.values(), *head.values()])
    return Prepared(model, groups, rate, trainable, file_bytes)


def _tensor_bytes(tensors: dict[str, nn.Parameter]) -> int:
    """Size of a safetensors file of these tensors in fp32."""
    content = {name: value.detach().float().contiguous().cpu() for name, value in tensors.items()}
    return len(safetensors.torch.save(content))


def _writer(
    adapters: dict[str, QRLoRALinear],
    basis: Basis,
    head: dict[str, nn.Parameter],
    labels: tuple[str, ...],
    start: Checkpoint,
) -> Callable[[], int]:
    def file_bytes() -> int:
        customer = Coefficients(
            values=get_coefficients(adapters),
            basis_digest=basis.digest,
            base_name=start.name,
            base_digest="0" * 64,  # as long as the real one, which takes a second to compute
            task=Classification.name if len(labels) > 1 else Regression.name,
            labels=labels,
            head={name: value.detach().float().cpu().numpy() for name, value in head.items()},
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "customer.safetensors"
            write_coefficients(customer, path)
            return path.stat().st_size

    return file_bytes


def free(device: str) -> None:
    """Hand cached memory back, which the other processes of this GPU need."""
    if device == "cuda":
        torch.cuda.empty_cache()
