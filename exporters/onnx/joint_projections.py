"""One product for query, key and value, whose result packed attention takes as it is.

`PackedMultiHeadAttention` takes `[tokens, heads, 3, size]` in the place of three inputs, and the query's bias beside
it, so a block has one product where it had three and a sum, and no Split behind it. The operator lays the three out
itself, a pass over the tokens: that pays where launches count, and costs where bytes do. Branches lie in the joint
product as `branch_fusion` has them.
"""

from typing import Any

import torch
from torch import nn

from exporters.onnx.branch_fusion import FusedBranch
from exporters.onnx.varlen import Joined, VarlenPacking
from qrlora_deploy.models.families import FAMILIES


class _Joint(nn.Module):
    """`[..., in]` to `[..., heads * 3 * size]`, of three layers that read the same input, without their biases."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, layers: list[Any], heads: int, packing: VarlenPacking) -> None:
        super().__init__()
        self.heads, self.packing = heads, packing
        branches = [layer for layer in layers if isinstance(layer, FusedBranch)]
        self.wide = branches[0].wide if branches else None
        height = len(branches[0].weight) if branches else layers[0].in_features
        parts = [_weight(layer, height).unflatten(1, (heads, -1)) for layer in layers]
        self.register_buffer("weight", torch.stack(parts, 2).flatten(1), persistent=False)
        zero = torch.zeros(self.weight.shape[1] // 3, dtype=self.weight.dtype)
        biases = [zero if layer.bias is None else layer.bias.detach() for layer in layers]
        self.register_buffer("bias", torch.cat(biases), persistent=False)
        self._seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._seen is not x:
            z = x if self.wide is None else self.wide.rows.once(self.wide, x)
            self._seen, self.packing.joined = x, Joined(z @ self.weight, self.bias)
        whole: torch.Tensor = self.packing.joined.states
        return whole


class _Column(nn.Module):
    """Query, key or value of the joint product, as attention takes them that is not packed."""

    def __init__(self, joint: _Joint, index: int) -> None:
        super().__init__()
        self.joint, self.index = joint, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        whole = self.joint(x).unflatten(-1, (self.joint.heads, 3, -1))
        return whole.select(-2, self.index).flatten(-2) + self.joint.bias.unflatten(0, (3, -1))[self.index]


def join_projections(model: Any, packing: VarlenPacking) -> int:
    """Make one product of the query, key and value of every block, in place, where attention can be packed.

    Call it after a run, and after biases were folded and branches fused.

    Returns:
        The number of blocks.
    """
    if packing.obstacle:
        packing.joint = False
        return 0
    known = [family.attention for family in FAMILIES if family.attention is not None and family.block is not None]
    made = 0
    for module in list(model.modules()):
        for names in {(attention.query, attention.key, attention.value) for attention in known}:
            layers = [_find(module, name) for name in names]
            if all(layer is not None for layer in layers):
                joint = _Joint(layers, model.config.num_attention_heads, packing)
                for index, name in enumerate(names):
                    module.set_submodule(name, _Column(joint, index))
                made += 1
    return made


def _find(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if type(found) in (nn.Linear, FusedBranch) else None


def _weight(layer: Any, height: int) -> torch.Tensor:
    """`[in + ranks, out]`; zeros in the place of branches that the layer does not have."""
    weight = layer.weight.detach() if isinstance(layer, FusedBranch) else layer.weight.detach().T
    return nn.functional.pad(weight, (0, 0, 0, height - len(weight)))
