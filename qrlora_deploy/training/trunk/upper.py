"""The upper blocks without padding: linear layers see tokens, attention alone sees rows.

For encoders of BERT's shape: BERT, RoBERTa, MPNet, DistilBERT and what has their module names. Where the head reads
the first token, only the first tokens are computed beyond keys and values in the last block. There is no dropout here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qrlora_deploy.errors import InputError
from qrlora_deploy.models.families import Family, of_block
from qrlora_deploy.training.trunk.padding_free import Gather, Group, Layout, padded_layout
from qrlora_deploy.training.trunk.split import SplitModel, agree, probe

BIAS_STRIDE = 8
"""PyTorch's memory-efficient attention reads rows of a bias that begin at a multiple of this, else it copies."""


@dataclass(frozen=True)
class _Block:
    query: Any
    key: Any
    value: Any
    mix: Any
    mix_norm: Any
    expand: Any
    activation: Any
    contract: Any
    norm: Any


class Upper:
    """The adapted blocks and the head of a split model.

    Side branches are called as they are, so attach them first.

    Args:
        split: an encoder of a family whose `Family.block` is known.
        of_tokens: whether the model answers every token, and not the text by its first one.

    Raises:
        InputError: the model is of another kind, or does not answer here as it does itself.
    """

    def __init__(self, split: SplitModel, of_tokens: bool = False) -> None:
        self.owner: Any = split.owner
        self.of_tokens = of_tokens
        self.heads = int(split.model.config.num_attention_heads)
        self.head_width = int(split.model.config.hidden_size) // self.heads
        family = of_block(split.blocks[-1])
        self.blocks = [_read_block(split.model, block, family) for block in list(split.blocks)[split.first :]]
        self.head = _read_head(split.model, family, of_tokens)
        self._biases: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}
        _check_upper(self, split)

    def __call__(self, hidden: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Logits `[rows, labels]` or `[tokens, labels]` of the inputs `[tokens, width]` of the first adapted block."""
        masks = [self._mask(group, hidden) for group in layout.groups]
        for block in self.blocks if self.of_tokens else self.blocks[:-1]:
            inputs = _as_multiplied(hidden)
            attended = self._attend(block.query(inputs), block, inputs, layout, masks)
            hidden = self._finish(block, hidden, attended)
        if self.of_tokens:
            return self.head(hidden)
        # The head reads the first tokens only, so nothing else is asked of the last block.
        block, first = self.blocks[-1], Gather.apply(hidden, layout.first)
        attended = self._attend(
            block.query(first),
            block,
            _as_multiplied(hidden),
            layout,
            [None if mask is None else mask[:, :, :1] for mask in masks],
        )
        return self.head(self._finish(block, first, attended))

    def _attend(
        self, query: torch.Tensor, block: _Block, x: torch.Tensor, layout: Layout, masks: list[torch.Tensor | None]
    ) -> torch.Tensor:
        """What each token of `query` draws from the texts `x`; `query` has all tokens or the first ones."""
        only_first = len(query) < len(x)
        sizes = [group.tokens for group in layout.groups]
        queries = query.split([group.rows for group in layout.groups] if only_first else sizes)
        keys, values = block.key(x).split(sizes), block.value(x).split(sizes)
        found = []
        for group, mask, *parts in zip(layout.groups, masks, queries, keys, values, strict=True):
            part, key, value = (
                (part if only_first and index == 0 else group.spread(part))
                .view(group.rows, -1, self.heads, self.head_width)
                .transpose(1, 2)
                for index, part in enumerate(parts)
            )
            mixed = functional.scaled_dot_product_attention(part, key, value, attn_mask=mask)
            mixed = mixed.transpose(1, 2).reshape(-1, query.shape[1])
            found.append(mixed if only_first else group.gather(mixed))
        return torch.cat(found) if len(found) > 1 else found[0]

    def _finish(self, block: _Block, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = block.mix_norm(block.mix(attended) + x)
        return block.norm(block.contract(block.activation(block.expand(x))) + x)

    def _mask(self, group: Group, like: torch.Tensor) -> torch.Tensor | None:
        """What attention adds to its scores, or which places it may see; None where that is every place."""
        if not hasattr(self.owner, "relative_attention_bias"):
            return group.mask
        bias = self._bias(group.length, like.device, _as_multiplied(like[:0]).dtype)
        if group.mask is None:
            return bias
        # Not torch.where, which brings its number over from the host; a capture forbids that.
        return bias.masked_fill(~group.mask, torch.finfo(bias.dtype).min)

    def _bias(self, length: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """`[1, heads, length, length]`, MPNet's, the same for every row; from its own function."""
        key = (length, device, dtype)
        if key not in self._biases:
            with torch.no_grad():
                # It looks at the shape alone.
                bias = self.owner.compute_position_bias(torch.empty(1, length, device=device)).to(dtype)
            self._biases[key] = functional.pad(bias, (0, -length % BIAS_STRIDE))[..., :length]
        return self._biases[key]


def _as_multiplied(x: torch.Tensor) -> torch.Tensor:
    """What matrices are multiplied with: under autocast, rounded once and not for each of them."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _read_block(model: Any, block: nn.Module, family: Family | None) -> _Block:
    if family is None or family.attention is None or family.block is None or of_block(block) is not family:
        raise InputError(f"{type(model).__name__} has blocks of another kind than BERT's")
    paths = (*vars(family.attention).values(), *vars(family.block).values())
    return _Block(*(block.get_submodule(path) for path in paths))


def _read_head(model: Any, family: Family | None, of_tokens: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """From tokens, the first ones of each text or all, to logits."""
    known = None if family is None else family.token_head if of_tokens else family.head
    if known is None:
        raise InputError(f"{type(model).__name__} has a head of another kind than BERT's")
    return known(model)


def _check_upper(upper: Upper, split: SplitModel) -> None:
    batch, _ = probe(split.model, "right")
    length = batch["attention_mask"].shape[1]
    training = split.model.training
    split.model.eval()
    try:
        hidden = split.trunk(batch)
        with torch.no_grad():
            whole = split.forward(split.model, batch)
            found = upper(hidden.flatten(0, 1), padded_layout(batch["attention_mask"].sum(1), length))
            if upper.of_tokens:
                kept = batch["attention_mask"].bool()
                whole, found = whole[kept], found[kept.flatten()]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{type(split.model).__name__} has a head of another kind than BERT's") from error
    finally:
        split.model.train(training)
    if not agree(found, whole):
        raise InputError(f"{type(split.model).__name__} does not compute as BERT does")
