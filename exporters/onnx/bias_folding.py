"""Biases of attention that need no operator of their own in the graph.

Every bias is one pass over the activations, `[tokens, width]` read and written, and one launch. Two of the
three of an attention can go without changing what it computes:

- of the keys: `q . (k_j + b) = q . k_j + q . b` moves all scores of a query alike, and softmax does not see that;
- of the values: weights of a query add up to 1, so `sum_j p_j (v_j + b) = sum_j p_j v_j + b`, which the output
  layer turns into `W_o b`, a part of its own bias, and that one is fused with the LayerNorm behind it.
"""

from typing import Any

import torch
from torch import nn

from exporters.onnx.switchable import TableBranch
from qrlora_deploy.models.families import FAMILIES


def fold_attention_biases(model: Any) -> int:
    """Take the biases of keys and values out of `model`, in place; returns how many.

    A value's bias stays where the output layer is another one for each customer.
    """
    folded = 0
    known = [family.attention for family in FAMILIES if family.attention is not None and family.block is not None]
    places = [(attention.key, attention.value, attention.output) for attention in known]
    for module in list(model.modules()):
        for names in places:
            layers = [layer for name in names if (layer := _find(module, name)) is not None]
            if len(layers) == len(names):
                folded += _fold(*layers)
    return folded


def _fold(key: nn.Module, value: nn.Module, output: nn.Module) -> int:
    folded = 0
    if _base(key).bias is not None:
        _base(key).bias = None
        folded += 1
    linear: Any = _base(value)
    if linear.bias is not None and isinstance(output, nn.Linear) and output.bias is not None:
        with torch.no_grad():
            output.bias.copy_(output.weight.double() @ linear.bias.double() + output.bias.double())
        linear.bias = None
        folded += 1
    return folded


def _find(module: nn.Module, path: str) -> nn.Module | None:
    """The linear layer at `path`, with its side branch where it has one; None where there is none."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if type(_base(found)) is nn.Linear else None


def _base(layer: Any) -> Any:
    return layer.base if isinstance(layer, TableBranch) else layer
