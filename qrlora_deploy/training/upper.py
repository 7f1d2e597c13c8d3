"""The upper blocks without padding: linear layers see tokens, attention alone sees rows.

For encoders of BERT's shape whose head reads the first token: BERT, RoBERTa, MPNet, DistilBERT and
what has their module names. In the last block only the first tokens are computed beyond keys and
values. There is no dropout here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qrlora_deploy.errors import InputError
from qrlora_deploy.training.trunk import SplitModel, agree, probe

FAMILIES = (
    # BERT, RoBERTa and their kin
    (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "intermediate.intermediate_act_fn",
        "output.dense",
        "output.LayerNorm",
    ),
    # MPNet
    (
        "attention.attn.q",
        "attention.attn.k",
        "attention.attn.v",
        "attention.attn.o",
        "attention.LayerNorm",
        "intermediate.dense",
        "intermediate.intermediate_act_fn",
        "output.dense",
        "output.LayerNorm",
    ),
    # DistilBERT
    (
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "sa_layer_norm",
        "ffn.lin1",
        "ffn.activation",
        "ffn.lin2",
        "output_layer_norm",
    ),
)
"""Where a block of each family has its parts, in the order of `_Block`."""


class _Spread(torch.autograd.Function):
    """Rows of a matrix to their places among `size` zero rows; the gradient is their gathering."""

    @staticmethod
    def forward(context: Any, packed: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
        context.save_for_backward(places)
        return packed.new_zeros(size, packed.shape[1]).index_copy_(0, places, packed)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return gradient.index_select(0, context.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """Rows of a matrix, each at most once; so the gradient needs no sums."""

    @staticmethod
    def forward(context: Any, padded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(places)
        context.size = padded.shape[0]
        return padded.index_select(0, places)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        zeros = gradient.new_zeros(context.size, gradient.shape[1])
        return zeros.index_copy_(0, context.saved_tensors[0], gradient), None


@dataclass(frozen=True)
class Group:
    """Texts that attention sees as one rectangle.

    Attributes:
        rows: number of texts.
        length: of the longest one, or more.
        tokens: how many rows of the matrix are theirs.
        mask: `[rows, 1, 1, length]` bool, which places hold tokens.
        places: `[tokens]` int64, row * length + position; None where every place is in the matrix,
            padding too.
    """

    rows: int
    length: int
    tokens: int
    mask: torch.Tensor
    places: torch.Tensor | None

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, width]` to `[rows * length, width]`."""
        return x if self.places is None else _Spread.apply(x, self.places, self.rows * self.length)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows * length, width]` to `[tokens, width]`."""
        return x if self.places is None else _Gather.apply(x, self.places)


@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch lie in a matrix `[tokens, width]`.

    Attributes:
        groups: one after another.
        first: `[rows]` int64, the number of each text's first token.
    """

    groups: tuple[Group, ...]
    first: torch.Tensor


def packed_layout(lengths: torch.Tensor) -> Layout:
    """The layout of texts one after another, from their lengths `[rows]` int64 on the CPU, which ascend.

    Attention pads, and three rectangles for short, middling and long texts are less padding than one.
    """
    longest = int(lengths[-1])
    bounds = torch.searchsorted(lengths, torch.tensor([longest // 4, longest // 2]), right=True).tolist()
    edges = [0, *bounds, len(lengths)]
    parts = [lengths[start:end] for start, end in pairwise(edges) if end > start]
    return Layout(tuple(_group(part) for part in parts), lengths.cumsum(0) - lengths)


def _group(lengths: torch.Tensor) -> Group:
    length = int(lengths[-1])
    mask = torch.arange(length) < lengths[:, None]
    return Group(len(lengths), length, int(lengths.sum()), mask[:, None, None], mask.flatten().nonzero().squeeze(1))


def padded_layout(lengths: torch.Tensor, length: int) -> Layout:
    """The layout of texts padded on the right to `length`; depends on `lengths [rows]` by values only."""
    rows = len(lengths)
    mask = torch.arange(length, device=lengths.device) < lengths[:, None]
    group = Group(rows, length, rows * length, mask[:, None, None], None)
    return Layout((group,), torch.arange(rows, device=lengths.device) * length)


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
        split: an encoder of one of `FAMILIES`.

    Raises:
        InputError: the model is of another kind, or does not answer here as it does itself.
    """

    def __init__(self, split: SplitModel) -> None:
        self.owner: Any = split.owner
        self.heads = int(split.model.config.num_attention_heads)
        self.head_width = int(split.model.config.hidden_size) // self.heads
        self.blocks = [_read_block(split.model, block) for block in list(split.blocks)[split.first :]]
        self.head = _read_head(split.model)
        self._biases: dict[tuple[int, torch.device], torch.Tensor] = {}
        _check_upper(self, split)

    def __call__(self, hidden: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Logits `[rows, labels]` of the inputs `[tokens, width]` of the first adapted block."""
        masks = [self._mask(group) for group in layout.groups]
        for block in self.blocks[:-1]:
            attended = self._attend(block.query(hidden), block, hidden, layout, masks)
            hidden = self._finish(block, hidden, attended)
        # The head reads the first tokens only, so nothing else is asked of the last block.
        block, first = self.blocks[-1], _Gather.apply(hidden, layout.first)
        attended = self._attend(block.query(first), block, hidden, layout, [mask[:, :, :1] for mask in masks])
        return self.head(self._finish(block, first, attended))

    def _attend(
        self, query: torch.Tensor, block: _Block, x: torch.Tensor, layout: Layout, masks: list[torch.Tensor]
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

    def _mask(self, group: Group) -> torch.Tensor:
        if not hasattr(self.owner, "relative_attention_bias"):
            return group.mask
        key = (group.length, group.mask.device)
        if key not in self._biases:
            # MPNet's, the same for every row; from its own function, which looks at the shape alone.
            with torch.no_grad():
                self._biases[key] = self.owner.compute_position_bias(group.mask.new_empty(1, group.length))
        bias = self._biases[key]
        if torch.is_autocast_enabled(bias.device.type):
            bias = bias.to(torch.get_autocast_dtype(bias.device.type))
        # Not torch.where, which brings its number over from the host; a capture forbids that.
        return bias.masked_fill(~group.mask, torch.finfo(bias.dtype).min)


def _read_block(model: Any, block: nn.Module) -> _Block:
    for family in FAMILIES:
        try:
            return _Block(*(block.get_submodule(path) for path in family))
        except AttributeError:
            continue  # of another family
    raise InputError(f"{type(model).__name__} has blocks of another kind than BERT's")


def _read_head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """From first tokens `[rows, width]` to logits."""
    if hasattr(model, "pre_classifier"):  # DistilBERT
        return lambda first: model.classifier(model.pre_classifier(first).relu())
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None:  # BERT
        return lambda first: model.classifier(pooler(first[:, None]))
    return lambda first: model.classifier(first[:, None])


def _check_upper(upper: Upper, split: SplitModel) -> None:
    batch, _ = probe(split.model, "right")
    length = batch["attention_mask"].shape[1]
    training = split.model.training
    split.model.eval()
    try:
        hidden = split.trunk(batch)
        with torch.no_grad():
            whole = split.model(**batch).logits
            found = upper(hidden.flatten(0, 1), padded_layout(batch["attention_mask"].sum(1), length))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{type(split.model).__name__} has a head of another kind than BERT's") from error
    finally:
        split.model.train(training)
    if not agree(found, whole):
        raise InputError(f"{type(split.model).__name__} does not compute as BERT does")
