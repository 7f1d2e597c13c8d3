"""Emit attention as the standard ONNX operator instead of hoping that a pattern is recognised.

A function registered in transformers' attention registry calls `torch.onnx.ops.attention`, which
the exporter writes as one `Attention` node of opset 23. Pattern fusion loses the attention as soon
as the graph changes around it, and its mask handling is wrong under left padding.

Scores with a soft cap are written out instead. The operator has an attribute for the cap, but ONNX Runtime up to 1.26
caps the sum of scores and mask, so that what is masked counts as `-cap`; newer ones mask what is capped, as models do.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from qrlora_deploy.errors import InputError

NAME = "qrlora_onnx"

ATTEND = "qrlora_attend"
"""Attribute of a module that has a function of its own in the place of `attend`."""

HEADS = "qrlora_heads"
"""Attribute of an attention module: the `Heads` that it asked for when it last ran."""

BIASED = "qrlora_bias"
"""Attribute of an encoder with a bias by distance: None, or a function that makes the bias in its place."""

UNCAPPED = "qrlora_uncapped"
"""Attribute of an attention module that leaves its soft cap out, to see whether that would be noticed."""

NEUTRAL = frozenset({"position_ids", "cache_position", "deterministic", "use_cache", "return_dict"})
"""Keywords that models hand on to their attention and that change no number of it: other implementations want them."""


@dataclass(frozen=True)
class Heads:
    """How queries, keys and values are cut.

    Attributes:
        queries, keys: number of heads.
        scale: of the scores; None: `1 / sqrt(size)`.
        causal: whether a token looks at earlier ones alone.
        window: how far a token looks, which the mask says too; None: as far as the text goes.
        softcap: scores become `softcap * tanh(scores / softcap)` before they are masked; None: they stay.
    """

    queries: int
    keys: int
    scale: float | None
    causal: bool = False
    window: int | None = None
    softcap: float | None = None


def use_onnx_attention(model: Any) -> bool:
    """Switch `model` to the registered attention, in place.

    MPNet does not use transformers' attention registry; its attention is replaced.

    Returns:
        False for a model that keeps an attention of its own (BERT before transformers 5). That is
        exported then: sdpa becomes `Attention` too, anything else becomes MatMul and Softmax.
    """
    own = [(path, module) for path, module in model.named_modules() if isinstance(module, MPNetSelfAttention)]
    for path, module in own:
        model.set_submodule(path, PositionBiasedAttention(module))
    for module in model.modules():
        if isinstance(module, MPNetEncoder):
            _share_position_bias(module)
    if own:
        return True
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """`query, key, value [batch, heads, length, size]` to `[batch, length, heads, size]`.

    The operator gets 3-D inputs, so the transposes that the model made cancel out in the graph.
    `attention_mask [batch, 1, query, key]` is boolean (True takes part) or float (added to the scores).

    Raises:
        InputError: the model wants something of its attention that would be missing in the graph.
    """
    _refuse_unknown(module, attention_mask, sliding_window, others)
    batch, heads, length, _size = query.shape
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    cut = Heads(heads, key.shape[1], scaling, bool(causal), sliding_window, softcap)
    setattr(module, HEADS, cut)
    if softcap is not None and getattr(module, UNCAPPED, False):
        cut = replace(cut, softcap=None)
    states = (_merge_heads(query), _merge_heads(key), _merge_heads(value))
    output = getattr(module, ATTEND, attend)(*states, attention_mask, cut)
    return output.reshape(batch, length, heads, -1), None


def _refuse_unknown(module: Any, mask: torch.Tensor | None, window: int | None, others: dict[str, Any]) -> None:
    """Refuse what a model says to its attention and nothing here would do: the graph would answer something else."""
    name = type(module).__name__
    # None, False and 0 say that there is nothing of the kind, such as the dropout of a model in use.
    unknown = [key for key, value in others.items() if key not in NEUTRAL and (torch.is_tensor(value) or value)]
    if unknown:
        raise InputError(
            f"{name} asks its attention for {', '.join(unknown)}, which the exported graph would not have; "
            f"this model cannot be exported"
        )
    if window is not None and mask is None:
        raise InputError(f"{name} looks {window} tokens far, but has no mask that says so; it cannot be exported")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    heads: Heads,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operator: `query, key, value [batch, length, heads * size]` to the same shape.

    A float `mask` and `bias [1, heads, query, key]` are both added to the scores. Every layer has the
    same sum of them, so ONNX Runtime computes it once.
    """
    if bias is not None:
        mask = bias if mask is None else bias + mask
    if heads.softcap is not None:
        return _attend_capped(query, key, value, mask, heads, heads.softcap)
    output, *_rest = torch.onnx.ops.attention(
        query,
        key,
        value,
        mask,
        # A mask holds the causal part already, and the operator takes only one of the two.
        is_causal=heads.causal and mask is None and query.shape[1] > 1,
        q_num_heads=heads.queries,
        kv_num_heads=heads.keys,
        scale=heads.scale,
    )
    result: torch.Tensor = output
    return result


def _attend_capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, heads: Heads, cap: float
) -> torch.Tensor:
    """As `attend`, with capped scores, in products and a softmax."""
    queries, keys, values = (
        states.unflatten(2, (count, -1)).transpose(1, 2)
        for states, count in ((query, heads.queries), (key, heads.keys), (value, heads.keys))
    )
    if heads.keys != heads.queries:
        keys, values = (states.repeat_interleave(heads.queries // heads.keys, 1) for states in (keys, values))
    scale = queries.shape[-1] ** -0.5 if heads.scale is None else heads.scale
    scores = (queries @ keys.transpose(2, 3)) * scale
    scores = torch.tanh(scores / cap) * cap
    if mask is None and heads.causal:
        mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    return (weights @ values).transpose(1, 2).flatten(2)


def attend_lengths(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor, heads: Heads
) -> torch.Tensor:
    """As `attend`, where a row attends to its first tokens, `lengths [batch]` of them; an operator of opset 24.

    Outside of an export it is computed by the operator of opset 23, with a mask.
    """
    if not torch.compiler.is_exporting():
        mask = torch.arange(key.shape[1]) < lengths[:, None]
        return attend(query, key, value, mask[:, None, None, :].expand(-1, 1, query.shape[1], -1), heads)
    attributes: dict[str, Any] = {"q_num_heads": heads.queries, "kv_num_heads": heads.keys}
    if heads.scale is not None:
        attributes["scale"] = heads.scale
    return torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, None, None, None, lengths),
        attributes,
        dtype=query.dtype,
        shape=query.shape,
        version=24,
    )


class PositionBiasedAttention(nn.Module):
    """MPNet's attention, which adds a bias by distance to the scores, by the operator.

    Args:
        original: what it takes the place of; its layers keep their paths.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = original.q, original.k, original.v, original.o
        self.heads = Heads(
            original.num_attention_heads, original.num_attention_heads, original.attention_head_size**-0.5
        )

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *others: Any, **options: Any
    ) -> tuple[torch.Tensor]:
        """`hidden_states [batch, length, width]` to the same.

        Mask and bias are added to the scores. The bias comes by name or as the last of `others`;
        before it, transformers 4 has a mask of heads, which a model in use leaves empty.
        """
        bias = options.get("position_bias", others[-1] if others else None)
        states = (self.q(hidden_states), self.k(hidden_states), self.v(hidden_states))
        return (self.o(getattr(self, ATTEND, attend)(*states, attention_mask, self.heads, bias)),)


def _share_position_bias(encoder: Any) -> None:
    """Let MPNet make its bias `[1, heads, query, key]` once, not a copy for each row of the batch."""
    compute = encoder.compute_position_bias

    def share(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = getattr(encoder, BIASED)
        bias: torch.Tensor = compute(states[:1], *args, **kwargs) if made is None else made()
        return bias

    setattr(encoder, BIASED, None)
    encoder.compute_position_bias = share


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
