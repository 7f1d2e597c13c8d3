"""A layer with side branches of many customers, as PEFT's tuners have them."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional

from qrlora_deploy.formats.basis import BasisTarget
from qrlora_deploy.models.targets import is_conv1d

NOBODY = "__base__"
"""What PEFT calls a row of a mixed batch that is the base's."""


class QRLoRALayer(nn.Module, BaseTunerLayer):
    """`y = base_layer(x) + Q (c * (R x))`, with one `c [rank]` fp32 an adapter and `Q`, `R` for all of them.

    Args:
        base_layer: an `nn.Linear` or GPT-2 `Conv1D` with weight `W [out, in]` (Conv1D: transposed).
        target: its factors.
    """

    adapter_layer_names = ("qrlora_c",)

    qrlora_q: torch.Tensor
    qrlora_r: torch.Tensor

    def __init__(self, base_layer: nn.Module, target: BasisTarget) -> None:
        super().__init__()
        weight = base_layer.get_parameter("weight")
        self.base_layer = base_layer
        self.qrlora_c = nn.ParameterDict()
        self.register_buffer("qrlora_q", torch.tensor(target.q).to(weight.device, weight.dtype), persistent=False)
        self.register_buffer("qrlora_r", torch.tensor(target.r).to(weight.device, weight.dtype), persistent=False)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def add(self, adapter_name: str, inference_mode: bool) -> None:
        """A new adapter, whose coefficients are zero: it answers as the base."""
        rank, device = self.qrlora_r.shape[0], self.qrlora_q.device
        self.qrlora_c[adapter_name] = nn.Parameter(torch.zeros(rank, dtype=torch.float32, device=device))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own casts to the layer's dtype too: coefficients stay fp32 beside a layer of 16 bits.
        parameter = self.qrlora_c[adapter_name]
        if parameter.device.type != "meta":
            parameter.data = parameter.data.to(device or self.qrlora_q.device)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """`Q diag(c) R` in the layer's own orientation, in fp32."""
        delta = (self.qrlora_q.float() * self.qrlora_c[adapter_name].float()) @ self.qrlora_r.float()
        return delta.T if is_conv1d(self.get_base_layer()) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add active adapters to the weight.

        Raises:
            ValueError: `safe_merge` is set and a sum is NaN or Inf.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.qrlora_c:
                continue
            weight = self.get_base_layer().get_parameter("weight")
            merged = (weight.data.float() + self.get_delta_weight(name)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaN or Inf in the merged weights of the adapter {name}")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what was merged; what rounding took stays away."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight = self.get_base_layer().get_parameter("weight")
            weight.data = (weight.data.float() - self.get_delta_weight(name)).to(weight.dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[..., in]` to `[..., out]`; with `adapter_names`, one a row, each row for its own."""
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            if names is not None:
                raise ValueError("adapter_names needs adapters that are enabled and not merged")
            return self.base_layer(x, *args, **kwargs)
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        coefficients = self._active() if names is None else self._rows(names, x)
        if coefficients is None:
            return result
        projected = functional.linear(x.to(self.qrlora_r.dtype), self.qrlora_r)
        branch = functional.linear(projected * coefficients.to(projected.dtype), self.qrlora_q)
        return result + branch.to(result.dtype)

    def _active(self) -> torch.Tensor | None:
        """The sum of the active adapters' coefficients `[rank]`; None where none is active here."""
        active = [self.qrlora_c[name] for name in self.active_adapters if name in self.qrlora_c]
        return torch.stack(active).sum(dim=0) if len(active) > 1 else next(iter(active), None)

    def _rows(self, names: list[str], x: torch.Tensor) -> torch.Tensor:
        """Coefficients `[batch, 1, ..., rank]` of a batch `[batch, ..., in]`, zero in the base's rows."""
        if len(names) != len(x):
            raise ValueError(f"adapter_names has {len(names)} names for {len(x)} rows")
        nobody = torch.zeros_like(self.qrlora_q[0], dtype=torch.float32)
        rows = torch.stack([nobody if name == NOBODY else self.qrlora_c[name].float() for name in names])
        return rows.view(len(names), *[1] * (x.dim() - 2), -1)
