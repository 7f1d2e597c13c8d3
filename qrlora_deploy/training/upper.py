"""The upper blocks without padding: linear layers see tokens, attention alone sees rows.

For encoders of BERT's shape whose head reads the first token: BERT, RoBERTa, MPNet, DistilBERT and
what has their module names. In the last block only the first tokens are computed beyond keys and
values. There is no dropout here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qrlora_deploy.errors import InputError
from qrlora_deploy.training.trunk import SplitModel, agree, probe

PARTS = ("query", "key", "value", "mix", "mix_norm", "expand", "activation", "contract", "norm")
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
"""Where a block of each family has its parts, in the order of `PARTS`."""


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
class Layout:
    """How the tokens of a batch lie in a matrix `[tokens, width]`, and where in `rows * length` places.

    Attributes:
        rows: number of texts.
        length: of the longest one, or more.
        first: `[rows]` int64, the number of each text's first token.
        mask: `[rows, 1, 1, length]` bool, which places hold tokens.
        places: `[tokens]` int64, row * length + position; None where every place is in the matrix,
            padding too.
    """

    rows: int
    length: int
    first: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor | None

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, width]` to `[rows * length, width]`."""
        return x if self.places is None else _Spread.apply(x, self.places, self.rows * self.length)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows * length, width]` to `[tokens, width]`."""
        return x if self.places is None else _Gather.apply(x, self.places)

    def firsts(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, width]` to the first tokens `[rows, width]`."""
        return _Gather.apply(x, self.first)


def packed_layout(lengths: torch.Tensor) -> Layout:
    """The layout of texts one after another, from their lengths `[rows]` int64."""
    rows, length = len(lengths), int(lengths.max())
    steps = torch.arange(length, device=lengths.device)
    mask = steps < lengths[:, None]
    return Layout(rows, length, lengths.cumsum(0) - lengths, mask[:, None, None], mask.flatten().nonzero().squeeze(1))


def padded_layout(lengths: torch.Tensor, length: int) -> Layout:
    """The layout of texts padded on the right to `length`; depends on `lengths [rows]` by values only."""
    rows = len(lengths)
    steps = torch.arange(length, device=lengths.device)
    first = torch.arange(rows, device=lengths.device) * length
    return Layout(rows, length, first, (steps < lengths[:, None])[:, None, None], None)


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
        self.blocks = [_read_block(split.model, block) for block in list(split.blocks)[split.first :]]
        self.head = _read_head(split.model)
        self._biases: dict[tuple[int, torch.device], torch.Tensor] = {}
        _check_upper(self, split)

    def __call__(self, hidden: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Logits `[rows, labels]` of the inputs `[tokens, width]` of the first adapted block."""
        mask = self._mask(layout)
        for block in self.blocks[:-1]:
            hidden = self._run(block, hidden, layout, mask, layout.gather)
        # The head reads the first tokens only, so nothing else is asked of the last block.
        return self.head(self._run(self.blocks[-1], hidden, layout, mask[:, :, :1], None))

    def _run(
        self,
        block: _Block,
        x: torch.Tensor,
        layout: Layout,
        mask: torch.Tensor,
        gather: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        key, value = (self._by_head(layout.spread(part(x)), layout) for part in (block.key, block.value))
        if gather is None:
            x = layout.firsts(x)
            query = block.query(x).view(layout.rows, 1, self.heads, -1).transpose(1, 2)
        else:
            query = self._by_head(layout.spread(block.query(x)), layout)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(-1, query.shape[1] * query.shape[3])
        x = block.mix_norm(block.mix(mixed if gather is None else gather(mixed)) + x)
        return block.norm(block.contract(block.activation(block.expand(x))) + x)

    def _by_head(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        return x.view(layout.rows, layout.length, self.heads, -1).transpose(1, 2)

    def _mask(self, layout: Layout) -> torch.Tensor:
        if not hasattr(self.owner, "relative_attention_bias"):
            return layout.mask
        key = (layout.length, layout.mask.device)
        if key not in self._biases:
            # MPNet's, the same for every row; from its own function, which looks at the shape alone.
            with torch.no_grad():
                self._biases[key] = self.owner.compute_position_bias(layout.mask.new_empty(1, layout.length))
        bias = self._biases[key]
        if torch.is_autocast_enabled(bias.device.type):
            bias = bias.to(torch.get_autocast_dtype(bias.device.type))
        return torch.where(layout.mask, bias, torch.finfo(bias.dtype).min)


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
    lengths = batch["attention_mask"].sum(1)
    training = split.model.training
    split.model.eval()
    try:
        hidden = split.trunk(batch)
        with torch.no_grad():
            whole = split.model(**batch).logits
            found = upper(hidden[batch["attention_mask"].bool()], packed_layout(lengths))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{type(split.model).__name__} has a head of another kind than BERT's") from error
    finally:
        split.model.train(training)
    if not agree(found, whole):
        raise InputError(f"{type(split.model).__name__} does not compute as BERT does")
