"""The side branch: a linear layer plus `Q diag(c) R`, without ever building the update."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.models.targets import is_adaptable, is_conv1d


class SideBranch(nn.Module):
    """A layer in the place of another one, `base`, whose attributes it has: some models look at their layers' own,
    as T5 does at the dtype of a weight."""

    base: nn.Module

    @property
    def weight(self) -> torch.Tensor:
        """The layer's weight, in its own orientation."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias, if it has one."""
        found: torch.Tensor | None = getattr(self.base, "bias", None)
        return found

    @property
    def in_features(self) -> int:
        """Values of an input."""
        return self.weight.shape[0 if is_conv1d(self.base) else 1]

    @property
    def out_features(self) -> int:
        """Values of an output."""
        return self.weight.shape[1 if is_conv1d(self.base) else 0]


class QRLoRALinear(SideBranch):
    """`y = base(x) + Q (c * (R x))`, Liang and Bharadwaj, arXiv 2508.21810, equation of ΔW.

    Only `u` is trained, with `c = scale * u`. Under Adam a step in `u` has the same size for every
    coefficient, so `scale` is a learning rate per coefficient: `precondition` sets it so that each
    step changes the output by about the same amount. Files hold `c`.

    Args:
        base: an `nn.Linear` or GPT-2 `Conv1D` with weight `W [out, in]` (Conv1D: transposed); frozen.
        target: its factors.

    Raises:
        BasisMismatchError: the factors do not have the shape of the layer.
    """

    q: torch.Tensor
    r: torch.Tensor
    scale: torch.Tensor

    def __init__(self, base: nn.Module, target: BasisTarget) -> None:
        super().__init__()
        weight = base.get_parameter("weight")
        shape = tuple(weight.shape[::-1]) if is_conv1d(base) else tuple(weight.shape)
        expected = (target.q.shape[0], target.r.shape[1])
        if shape != expected:
            raise BasisMismatchError(f"{target.name} is {list(shape)} in the model but {list(expected)} in the basis")
        self.base = base
        self.register_buffer("q", torch.tensor(target.q).to(weight.device, weight.dtype), persistent=False)
        self.register_buffer("r", torch.tensor(target.r).to(weight.device, weight.dtype), persistent=False)
        ones = torch.ones(target.rank, dtype=torch.float32, device=weight.device)
        self.register_buffer("scale", ones, persistent=False)
        self.u = nn.Parameter(torch.zeros_like(ones))

    @property
    def c(self) -> torch.Tensor:
        """The coefficients `[rank]` in fp32."""
        return self.scale * self.u

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`; exactly `base(x)` where c is zero."""
        projected = functional.linear(x, self.r)
        return self.base(x) + functional.linear(projected * self.c.to(projected.dtype), self.q)


def insert(model: Any, basis: Basis) -> dict[str, QRLoRALinear]:
    """Put a side branch beside every target of `basis`.

    A basis made from a headless encoder fits the task model and the other way round: the model's
    prefix is added to or taken from the module paths as needed.

    Returns:
        The adapters by target name, in the order of the basis.

    Raises:
        InputError: a layer is missing or is not a linear layer.
        BasisMismatchError: a shape
            differs. The model is not changed then.
    """
    adapters, places = {}, []
    for target in basis.targets:
        path, module = resolve_layer(model, target.name)
        adapters[target.name] = QRLoRALinear(module, target)
        places.append(path)
    for path, adapter in zip(places, adapters.values(), strict=True):
        model.set_submodule(path, adapter)
    return adapters


def attach(model: Any, basis: Basis) -> dict[str, QRLoRALinear]:
    """As `insert`, and everything but `u` is frozen."""
    adapters = insert(model, basis)
    model.requires_grad_(False)
    for adapter in adapters.values():
        adapter.u.requires_grad_(True)
    return adapters


def detach(model: Any) -> None:
    """Take all side branches out again; the layers are the very objects from before."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, QRLoRALinear)]
    for path, module in found:
        model.set_submodule(path, module.base)


def set_coefficients(adapters: dict[str, QRLoRALinear], basis: Basis, values: np.ndarray) -> None:
    """Write a customer's `values [total_rank]` into the adapters.

    Raises:
        InputError: the length does not fit the basis.
    """
    with torch.no_grad():
        for name, part in basis.split(values).items():
            adapter = adapters[name]
            adapter.u.copy_(torch.tensor(part, device=adapter.u.device) / adapter.scale)


def get_coefficients(adapters: dict[str, QRLoRALinear]) -> np.ndarray:
    """The flat fp32 vector `[total_rank]` of `c` in the order of the adapters."""
    return np.concatenate([adapter.c.detach().float().cpu().numpy() for adapter in adapters.values()])


def precondition(adapters: dict[str, QRLoRALinear]) -> None:
    """Set `scale` to `1 / ||R_i||`, with geometric mean 1 over all targets, and `u` to zero.

    The rows of R differ by orders of magnitude, and `||R_i||` is how much a unit of `c_i` moves the
    output, as the columns of Q have norm 1. See docs/preconditioning.md for what else was tried.
    """
    norms = [adapter.r.float().norm(dim=1) for adapter in adapters.values()]
    largest = torch.stack([norm.max() for norm in norms]).max()
    floored = [norm.clamp_min(float(largest) * 1e-6 or 1.0) for norm in norms]
    mean = torch.cat(floored).log().mean().exp()
    with torch.no_grad():
        for adapter, norm in zip(adapters.values(), floored, strict=True):
            adapter.scale.copy_(mean / norm)
            adapter.u.zero_()


def resolve_layer(model: Any, name: str) -> tuple[str, nn.Module]:
    """Path and layer of a target, whether the basis was made from the headless encoder or the task model.

    Raises:
        InputError: it is missing, or not a linear layer.
    """
    prefix = getattr(model, "base_model_prefix", "")
    bare = name.removeprefix(f"{prefix}.")
    modules = dict(model.named_modules())
    for path in (name, bare, f"{prefix}.{bare}"):
        module = modules.get(path)
        if module is None:
            continue
        if not is_adaptable(module):
            raise InputError(f"{path} is a {type(module).__name__}; only nn.Linear and Conv1D can be adapted")
        return path, module
    raise InputError(f"the model {type(model).__name__} has no layer {name}")
