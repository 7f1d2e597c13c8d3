"""Packed attention: a second graph that sees tokens alone, on CUDA alone.

ONNX Runtime's `PackedMultiHeadAttention` takes the tokens of all rows, one behind the other, and where each row begins.
So the whole graph works on tokens, from the embedding on. Rows come back where the task reads its answer: at the first
token of each, or at all of them. Which token is where is counted by whoever runs it
(`runtime/sessions/packed_tokens.py`), without operators in the graph. A token's place in its row must be its place
among the row's tokens: that holds where padding is on the right. For all other masks there is the graph of
`padding_free` in the same bundle.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from exporters.onnx.attention import BIASED, Heads
from exporters.onnx.padding_free import Packing
from exporters.onnx.tracing import Example
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.runtime.bundle.packed_inputs import BORDERS, FIRSTS, OFFSETS, PLACES, ROWS, SEATS, packed_axes
from qrlora_deploy.runtime.sessions.packed_tokens import packed_arrays

OPERATOR = "PackedMultiHeadAttention"


class Joined(NamedTuple):
    """What one product of query, key and value gave.

    Attributes:
        states: `[1, tokens, heads * 3 * size]`, head by head.
        bias: `[3 * width]`, of the query, the key and the value.
    """

    states: torch.Tensor
    bias: torch.Tensor


class VarlenPacking(Packing):
    """As `Packing`; within `packed` blocks see tokens that never were in rows, and attention is the packed operator.

    Attributes:
        borders, offsets: as `packed_tokens` has them.
        obstacle: why there is no such graph, once the model has run; empty where there is one.
        start: number of a row's first position, as the model's embedding counts.
        firsts_only: whether the task reads the first token of each row alone.
        joined: of the block that runs, where query, key and value are one product.

    Args:
        required: a model with an obstacle is refused.
        joint: query, key and value are to be one product (`joint_projections`).
    """

    firsts_only = False
    start: int | None = None

    joined: Joined

    def __init__(self, required: bool = False, joint: bool = False) -> None:
        super().__init__()
        self.required, self.joint = required, joint
        self.borders = self.offsets = self.tokens
        self.given: dict[str, torch.Tensor] = {}
        self.obstacle = ""
        self._spoiled = False

    def possible(self, model: Any) -> bool:
        """Whether attention can be the packed operator; asked when `model` has run.

        Raises:
            InputError: it cannot, and is required to.
        """
        if self.obstacle and self.required:
            raise InputError(f"{type(model).__name__} cannot have {argument('attention', 'packed')}: {self.obstacle}")
        return not self.obstacle

    def explore(self, wrapper: nn.Module, examples: Mapping[str, Example]) -> None:
        """Find out, by two runs of the padded `wrapper`, where rows begin to be counted and what the task reads."""
        model: Any = wrapper.model
        inputs = {name: tensor for name, (tensor, _axes) in examples.items()}
        # Some models count no token that is padding's own, whatever the mask says.
        inputs["input_ids"] = torch.full_like(inputs["input_ids"], 3 if model.config.pad_token_id != 3 else 4)
        takes = inspect.signature(model.forward).parameters
        if "position_ids" not in takes:
            self.obstacle = self.obstacle or "it takes no position_ids"
            return
        found: list[int] = []
        with _watching_positions(model, found):
            wrapper(*inputs.values())
        if len(set(found)) != 1:
            self.obstacle = self.obstacle or "its positions are not counted from the first token of a row"
            return
        self.start = found[0]
        self._spoiled = True
        try:
            self.firsts_only = not bool(wrapper(*inputs.values()).isnan().any())
        finally:
            self._spoiled = False

    @contextmanager
    def packed(self, model: Any) -> Iterator[None]:
        """For a trace of `PackedAnswers` on `model`."""
        self.flat = True
        biased = [module for module in model.modules() if hasattr(module, BIASED)]
        for module in biased:
            setattr(module, BIASED, self._bias_by_distance(module))
        try:
            yield
        finally:
            self.flat = False
            for module in biased:
                setattr(module, BIASED, None)

    def packed_examples(self, names: Sequence[str], mask: torch.Tensor) -> dict[str, Example]:
        """Examples of all that such a graph may take of a batch with this mask, whose text inputs are `names`."""
        batch, length = mask.shape
        inputs = dict.fromkeys(names, torch.ones_like(mask).numpy()) | {"attention_mask": mask.numpy()}
        texts = [name for name in names if name != "attention_mask"]
        # A task that reads the first token alone has no use for the mask.
        wanted = (
            *texts,
            PLACES,
            ROWS,
            BORDERS,
            OFFSETS,
            *((FIRSTS,) if self.firsts_only else (SEATS, "attention_mask")),
        )
        arrays = packed_arrays(inputs, wanted, batch, length, int(mask.sum()))
        return {name: (torch.from_numpy(array), packed_axes(name)) for name, array in arrays.items()}

    def fill_packed(self, given: dict[str, torch.Tensor]) -> None:
        """Take the inputs of a run on tokens."""
        self.given, self.inside = given, True
        self.borders, self.offsets, self.rows = given[BORDERS], given[OFFSETS], given[ROWS]
        self.batch, self.length = self.offsets.shape

    def text_of(self, names: Sequence[str], takes_types: bool) -> dict[str, torch.Tensor]:
        """What the model is given, all rows as one."""
        named = {name: self.given[name].unsqueeze(0) for name in names if name != "attention_mask"}
        named["attention_mask"] = self.given.get("attention_mask", torch.ones_like(self.offsets))
        if takes_types and "token_type_ids" not in named:
            named["token_type_ids"] = torch.zeros(1, 1, dtype=torch.int64)
        places = self.given[PLACES].unsqueeze(0)
        return named | {"position_ids": places + self.start if self.start else places}

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """As `Packing.pack`; there is nothing to do where they never were in rows."""
        return states if self.flat else super().pack(states)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """As `Packing.unpack`; `[batch, 1, width]` where the task reads no other token."""
        if self.flat and self.firsts_only:
            return states.squeeze(0).index_select(0, self.given[FIRSTS]).unsqueeze(1)
        if self.flat:
            seats = self.given[SEATS].flatten()
            return states.squeeze(0).index_select(0, seats).unflatten(0, (self.batch, self.length))
        whole = super().unpack(states)
        # Inside, attention puts tokens into rows too.
        if self._spoiled and not self.inside:
            whole[:, 1:] = torch.nan
        return whole

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
        if not self.flat:
            self.obstacle = self.obstacle or _obstacle(heads)
            return super().attend(query, key, value, mask, heads, bias)
        self.attended += 1
        attributes: dict[str, Any] = {"num_heads": heads.queries}
        if heads.scale is not None:
            attributes["scale"] = heads.scale
        states: tuple[torch.Tensor | None, ...] = (query.squeeze(0), key.squeeze(0), value.squeeze(0), None)
        if self.joint:
            whole = self.joined.states.squeeze(0).unflatten(1, (heads.queries, 3, -1))
            states = (whole, None, None, self.joined.bias)
        output = torch.onnx.ops.symbolic(
            f"com.microsoft::{OPERATOR}",
            (*states, self.offsets, self.borders, bias),
            attributes,
            dtype=query.dtype,
            shape=query.shape[1:],
            version=1,
        )
        return output.unsqueeze(0)

    def _bias_by_distance(self, encoder: Any) -> Any:
        """Makes `[1, heads, length, length]` of a table by distance, which is computed here once and for all."""
        most = encoder.config.max_position_embeddings
        with torch.no_grad():
            whole = encoder.compute_position_bias(torch.empty(1, most, 1))[0]
        # What a token adds for one that is `d` further on, d from `1 - most` to `most - 1`.
        table = torch.cat([whole[:, 1:, 0].flip(1), whole[:, 0]], dim=1)

        def make() -> torch.Tensor:
            steps = torch.arange(self.length)
            distance = (steps + (most - 1)).unsqueeze(0) - steps.unsqueeze(1)
            bias = table.index_select(1, distance.flatten())
            return bias.unflatten(1, (self.length, self.length)).unsqueeze(0)

        return make


class PackedAnswers(nn.Module):
    """Takes tensors by position, of tokens and rows, and gives the answers of a task, fp32.

    Args:
        answers: the wrapper of the padded graph, with the same model.
        names: of the text inputs, and of all inputs.
    """

    def __init__(self, answers: Any, texts: Sequence[str], names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.task, self.rows, self.packing = answers.model, answers.task, answers.rows, answers.packing
        self.texts, self.names, self.row_names = texts, names, answers.row_names
        self.takes_types = "token_type_ids" in inspect.signature(self.model.forward).parameters

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        if self.rows is not None:
            self.rows.fill({name: named.pop(name) for name in self.row_names})
        self.packing.fill_packed(named)
        answers: torch.Tensor = self.task.forward(self.model, self.packing.text_of(self.texts, self.takes_types))
        return answers.float()


@contextmanager
def _watching_positions(model: Any, found: list[int]) -> Iterator[None]:
    """Note the number of the first position wherever an embedding is asked for rising positions."""

    def look(_module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        index = inputs[0]
        # The last row of the example is full.
        if index.dim() == 2 and index.shape[1] > 1:
            last = index[-1]
            if bool((last == torch.arange(len(last)) + last[0]).all()):
                found.append(int(last[0]))

    hooks = [module.register_forward_hook(look) for module in model.modules() if isinstance(module, nn.Embedding)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _obstacle(heads: Heads) -> str:
    """What the operator does not have."""
    if heads.window is not None:
        return f"a token looks {heads.window} tokens far"
    if heads.softcap is not None:
        return "its scores have a soft cap"
    if heads.keys != heads.queries:
        return f"{heads.queries} heads of queries share {heads.keys} of keys"
    return ""
