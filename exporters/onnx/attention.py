"""Emit attention as the standard ONNX operator instead of hoping that a pattern is recognised.

A function registered in transformers' attention registry calls `torch.onnx.ops.attention`, which
the exporter writes as one `Attention` node of opset 23. Pattern fusion loses the attention as soon
as the graph changes around it, and its mask handling is wrong under left padding.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

NAME = "qrlora_onnx"


def use_onnx_attention(model: Any) -> bool:
    """Switch `model` to the registered attention, in place.

    Returns:
        False for a model that does not use transformers' attention registry (MPNet; BERT before
        transformers 5). Its own attention is exported then: sdpa becomes `Attention` too, anything
        else becomes MatMul and Softmax.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return False
    model.set_attn_implementation(NAME)
    return True


def onnx_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`query, key, value [batch, heads, length, size]` to `[batch, length, heads, size]`.

    The operator gets 3-D inputs, so the transposes that the model made cancel out in the graph.
    `attention_mask [batch, 1, query, key]` is boolean (True takes part) or float (added to the scores).
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    output, *_rest = torch.onnx.ops.attention(
        _merge_heads(query),
        _merge_heads(key),
        _merge_heads(value),
        attention_mask,
        # A mask holds the causal part already, and the operator takes only one of the two.
        is_causal=bool(causal) and attention_mask is None and query.shape[2] > 1,
        q_num_heads=query.shape[1],
        kv_num_heads=key.shape[1],
        scale=scaling,
    )
    batch, heads, length, _size = query.shape
    return output.reshape(batch, length, heads, -1), None


def onnx_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """The boolean mask `[batch, 1, query, key]`, never left out: what the example input needs
    must not decide what the graph can do."""
    padding = options.get("attention_mask")
    bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)
    plain = bidirectional is not None and options.get("mask_function") is bidirectional
    if plain and padding is not None and padding.dim() == 2 and isinstance(options.get("q_length"), int | torch.SymInt):
        return padding.bool()[:, None, None, :].expand(-1, 1, options["q_length"], -1)
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = masking_utils.sdpa_mask(*args, **options | skips)
    # Under left padding a causal mask leaves the first rows nothing to look at, and the softmax of
    # nothing is NaN, which then spreads. Such rows are never used; give them everything.
    return None if mask is None else mask | ~mask.any(dim=-1, keepdim=True)


def _merge_heads(states: torch.Tensor) -> torch.Tensor:
    batch, _heads, length, _size = states.shape
    return states.transpose(1, 2).reshape(batch, length, -1)


AttentionInterface.register(NAME, onnx_attention)
AttentionMaskInterface.register(NAME, onnx_mask)
