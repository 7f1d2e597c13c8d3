"""Packed attention: a padding-free graph whose attention works on the tokens themselves, on CUDA alone.

ONNX Runtime's `PackedMultiHeadAttention` takes the tokens of all rows, one behind the other, and where each row begins,
so nothing is put back into rows between the first block and the last. A token's place in its row must be its place
among the row's tokens, and a row's first token must be one of them: that holds where padding is on the right. For
all other masks there is the graph of `padding_free` in the same bundle.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from exporters.onnx.attention import Heads
from exporters.onnx.padding_free import Packing
from qrlora_deploy.errors import InputError, argument

OPERATOR = "PackedMultiHeadAttention"


class VarlenPacking(Packing):
    """As `Packing`, and with `varlen` attention is the packed operator, which only a trace can have.

    Attributes:
        varlen: whether it is.
        borders: `[batch + 1]` int32, where the tokens of each row begin, and the end of the last.
        offsets: `[batch, length]` int32, the positions in the batch as one row: of the tokens, then of padding.
        obstacle: why attention cannot be the packed operator, once the model has run; empty where it can.

    Args:
        required: a model with an obstacle is refused.
    """

    varlen = False

    def __init__(self, required: bool = False) -> None:
        super().__init__()
        self.required = required
        self.borders = self.offsets = torch.empty(0, dtype=torch.int32)
        self.obstacle = ""

    def possible(self, model: Any) -> bool:
        """Whether attention can be the packed operator; asked when `model` has run.

        Raises:
            InputError: it cannot, and is required to.
        """
        if self.obstacle and self.required:
            raise InputError(f"{type(model).__name__} cannot have {argument('attention', 'packed')}: {self.obstacle}")
        return not self.obstacle

    @contextmanager
    def packed(self) -> Iterator[None]:
        """For a trace: attention is the packed operator."""
        self.varlen = True
        try:
            yield
        finally:
            self.varlen = False

    def fill(self, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        """As `Packing.fill`."""
        super().fill(tokens, mask)
        if not self.varlen:
            return
        present = (mask != 0).to(torch.int32)
        ends = present.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.borders = torch.cat([torch.zeros(1, dtype=torch.int32, device=mask.device), ends])
        self.offsets = _tokens_first(present.flatten(), ends[-1:]).view(self.batch, self.length)

    def _scatter(self, index: torch.Tensor) -> torch.Tensor:
        found = super()._scatter(index)
        # Of the tokens at position 0 the first counts. Its repeats, which fill up a bucket, lie behind the last row,
        # where the operator writes nothing.
        return torch.cat([torch.zeros_like(found[:1]), found[1:]]) if self.varlen else found

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        heads: Heads,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Packing.attend`."""
        if not self.varlen:
            self.obstacle = self.obstacle or _obstacle(heads)
            return super().attend(query, key, value, mask, heads, bias)
        self.attended += 1
        attributes: dict[str, Any] = {"num_heads": heads.queries}
        if heads.scale is not None:
            attributes["scale"] = heads.scale
        output = torch.onnx.ops.symbolic(
            f"com.microsoft::{OPERATOR}",
            (query.squeeze(0), key.squeeze(0), value.squeeze(0), None, self.offsets, self.borders, bias),
            attributes,
            dtype=query.dtype,
            shape=query.shape[1:],
            version=1,
        )
        return output.unsqueeze(0)


def _tokens_first(present: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The positions of `present [batch * length]` that hold 1, then the others, int32; `count [1]` holds 1.

    Kernels that put tokens back into rows read it. Flash attention does not, but which kernel runs is not decided here.
    """
    inside = present.cumsum(0, dtype=torch.int32)
    numbers = torch.arange(present.shape[0], dtype=torch.int32, device=present.device)
    seats = torch.where(present != 0, inside - 1, count + numbers - inside)
    return torch.zeros_like(numbers).scatter(0, seats.to(torch.int64), numbers)


def _obstacle(heads: Heads) -> str:
    """What the operator does not have."""
    if heads.window is not None:
        return f"a token looks {heads.window} tokens far"
    if heads.softcap is not None:
        return "its scores have a soft cap"
    if heads.keys != heads.queries:
        return f"{heads.queries} heads of queries share {heads.keys} of keys"
    return ""
