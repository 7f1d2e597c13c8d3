"""Padding-free graphs: the blocks of an encoder see the tokens that take part, in one row.

Padding costs a linear layer as much as text does. Here the hidden states `[batch, length, width]` are
gathered to `[1, tokens, width]` before the first block and put back behind the last one; every layer
in between works on tokens alone. Only attention needs to know which row a token belongs to: its
queries, keys and values are put back into rows for the operator, and its output is gathered again.

A row's tokens that are attended to go to its front, whatever the mask, and the operator is told how many
they are. ONNX Runtime keeps flash attention for that, and not for a mask. A first token that is padding
comes behind them: it asks, but is not asked. With a bias by position, as MPNet's, or a window order matters: tokens
go to their own places then, and the operator gets a mask.

What is put on a place without a token is a token of the same row. Attention does not look there, and no answer is read
there, but zero times NaN is NaN: were it a token of another row, a customer whose coefficients overflow would spoil
the answers of all others in the batch.
"""

from typing import Any

import torch
from torch import nn

from exporters.onnx.attention import ATTEND, Heads, attend, attend_lengths
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.models.targets import BLOCK
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, kept_tokens


class Packing:
    """The tokens of the current batch; the wrapper fills it before the model runs.

    Attributes:
        opset: that its operators are of.
        by_lengths: whether attention is told lengths where order does not matter; else it always gets the mask.
        attended: how many attentions ran on tokens.
        flat: whether the graph sees tokens alone, and only this project's sessions run it.
        inside: whether the run is between the first block and the last.
        tokens: `[tokens]` int64, positions in the batch as one row.
        places: `[batch * length]` int64, the other way round; for a token that was left out the first of its row.
        rows: `[tokens]` int64, the row of the batch that each token is of.
        lengths: `[batch]` int64, how many tokens of a row are attended to.
        seats: `[tokens]` int64, as `tokens`, with those that are attended to in front of each row.
        seated: `[batch * length]` int64, the other way round.
    """

    opset = 24
    by_lengths = True
    flat = False

    def __init__(self) -> None:
        self.attended = 0
        self.inside = False
        self.batch: Any = 0
        self.length: Any = 0
        self.tokens = self.places = self.rows = torch.empty(0, dtype=torch.int64)
        self.lengths = self.seats = self.seated = self.tokens

    def examples(self, mask: torch.Tensor) -> dict[str, tuple[torch.Tensor, tuple[str | int, ...]]]:
        """An example and its axes by the name of the input, for `mask [batch, length]`."""
        return {TOKEN_INDEX: (torch.from_numpy(kept_tokens(mask.numpy())), ("tokens",))}

    def fill(self, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        """Take the tokens of the run that begins, a batch of the shape of `mask`."""
        self.tokens, self.inside = tokens, False
        self.batch, self.length = mask.shape
        # The sizes only give shapes: as operands they would have to be copied to a GPU in every run.
        grid = torch.arange(self.batch * self.length, device=mask.device).unflatten(0, (self.batch, self.length))
        rows = torch.arange(self.batch, device=tokens.device)
        self.rows = rows[:, None].expand(-1, self.length).reshape(-1).index_select(0, tokens)
        self.places = self._inverse(tokens)
        present = (mask != 0).to(torch.int64)
        attended = present.sum(1)
        seat = torch.where(mask != 0, present.cumsum(1) - 1, attended[:, None])
        self.seats = (grid[:, :1] + seat).flatten().index_select(0, tokens)
        self.seated = self._inverse(self.seats)
        # Attention to nothing at all would be NaN; the first token of such a row attends to itself.
        self.lengths = torch.where(attended == 0, torch.ones_like(attended), attended)

    def _inverse(self, index: torch.Tensor) -> torch.Tensor:
        """`[batch * length]`: where in `index [tokens]` each position comes, or else the first position of its row."""
        found = self._scatter(index).unflatten(0, (self.batch, self.length))
        return torch.where(found < 0, found[:, :1], found).flatten()

    def _scatter(self, index: torch.Tensor) -> torch.Tensor:
        """`[batch * length]`: where in `index [tokens]` each position comes; -1 where it does not."""
        numbers = torch.arange(index.shape[0], device=index.device)
        nowhere = torch.full((self.batch * self.length,), -1, dtype=torch.int64, device=index.device)
        return nowhere.scatter(0, index, numbers)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """`[batch, length, width]` to `[1, tokens, width]`."""
        return self._take(states, self.tokens)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, width]` to `[batch, length, width]`."""
        return self._put(states, self.places)

    def _take(self, states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return states.flatten(0, 1).index_select(0, index).unsqueeze(0)

    def _put(self, states: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return states.squeeze(0).index_select(0, inverse).unflatten(0, (self.batch, self.length))

    def by_token(self, values: torch.Tensor) -> torch.Tensor:
        """`[batch, width]`, something of each row, to `[1, tokens, width]`."""
        return values.index_select(0, self.rows).unsqueeze(0)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        heads: Heads,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `attention.attend`, but on `[1, tokens, heads * size]`; mask and bias are the batch's.

        Raises:
            InputError: a token looks at earlier ones alone.
        """
        if heads.causal:
            raise _is_decoder()
        self.attended += 1
        ordered = bias is not None or heads.window is not None
        if ordered or heads.softcap is not None or not self.by_lengths:
            return self.pack(attend(self.unpack(query), self.unpack(key), self.unpack(value), mask, heads, bias))
        query, key, value = (self._put(states, self.seated) for states in (query, key, value))
        output = attend_lengths(query, key, value, self.lengths, heads)
        return self._take(output, self.seats)


class _FirstBlock(nn.Module):
    """Gathers the tokens, and runs the block on them."""

    def __init__(self, block: nn.Module, packing: Packing) -> None:
        super().__init__()
        self.block = block
        self.packing = packing

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the block's; `hidden_states [batch, length, width]`, the result on tokens."""
        packed = self.packing.pack(hidden_states)
        self.packing.inside = True
        return self.block(packed, *args, **kwargs)


class _LastBlock(nn.Module):
    """Runs the block on tokens, and puts them back."""

    def __init__(self, block: nn.Module, packing: Packing) -> None:
        super().__init__()
        self.block = block
        self.packing = packing

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the block's; `hidden_states [1, tokens, width]`, the result `[batch, length, width]`."""
        result = self.block(hidden_states, *args, **kwargs)
        self.packing.inside = False
        if isinstance(result, tuple):
            return (self.packing.unpack(result[0]), *result[1:])
        return self.packing.unpack(result)


def pack_blocks(model: Any, packing: Packing) -> int:
    """Make the blocks of `model` work on tokens, in place; their attention must be the operator already.

    Call it last: it changes the paths of modules in the first and the last block.

    Args:
        packing: must be filled before the model runs.

    Returns:
        The number of blocks. Each of them must have attended once when the model has run.

    Raises:
        InputError: the model does not have one list of numbered blocks, is a decoder, or turns the queries and
            keys of every block by tables that hold the places of a row.
    """
    blocks = _blocks(model)
    if blocks is None:
        raise InputError(
            f"{type(model).__name__} cannot be made padding-free: it does not have one list of numbered blocks; "
            f"leave {argument('padding_free')} out"
        )
    modules = [module for block in blocks for module in block.modules()]
    # GPT-2 of transformers 4.57 says so here alone: with a mask its attention is not told.
    if any(getattr(module, "is_causal", False) for module in modules):
        raise _is_decoder()
    if any("RotaryEmbedding" in type(module).__name__ for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} cannot be made padding-free: it has rotary positions, by the place in a row; "
            f"leave {argument('padding_free')} out"
        )
    for module in modules:
        setattr(module, ATTEND, packing.attend)
    blocks[-1] = _LastBlock(blocks[-1], packing)
    blocks[0] = _FirstBlock(blocks[0], packing)
    return len(blocks)


def _blocks(model: Any) -> nn.ModuleList | None:
    """The list of numbered blocks, where there is one alone."""
    found = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not BLOCK.search(f".{path}.")
    ]
    return found[0] if len(found) == 1 else None


def _is_decoder() -> InputError:
    return InputError(f"the model answers at the last token of a row; {argument('padding_free')} is for encoders")
