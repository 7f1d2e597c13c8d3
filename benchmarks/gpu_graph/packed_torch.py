"""PyTorch on packed batches: the tokens of all rows as one.

Attention is `torch.nn.attention.varlen`; MPNet's has a bias by distance, which that does not take, and is
`flex_attention` with a mask of blocks.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.gpu_graph.running import Contender, pinned, wait
from benchmarks.gpu_graph.shapes import Inputs

NAME = "qrlora_varlen"
PACKED_EAGER, PACKED_COMPILED = "torch eager, packed", "torch.compile, packed"


class PackedModel(nn.Module):
    """A RoBERTa classifier on `[1, tokens]`.

    Args:
        model: switched to varlen attention, in place.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.set_attn_implementation(NAME)
        self.model = model

    def further(self, borders: torch.Tensor) -> dict[str, Any]:
        """What `forward` takes of a batch besides."""
        return {}

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, borders: torch.Tensor, longest: int) -> torch.Tensor:
        """`ids` and `positions [1, tokens]` int64, `borders [rows + 1]` int32, to logits `[rows, labels]`."""
        states = self.model.base_model(
            input_ids=ids, position_ids=positions, borders=borders, longest=longest
        ).last_hidden_state
        logits: torch.Tensor = self.model.classifier(states[0].index_select(0, borders[:-1])[:, None])
        return logits


class PackedMpnet(nn.Module):
    """The same of MPNet.

    Args:
        model: a classifier; its layers are used as they are.
    """

    table: torch.Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.heads = model, model.config.num_attention_heads
        self.most = model.config.max_position_embeddings
        encoder = model.mpnet.encoder
        with torch.no_grad():
            place = next(model.parameters()).device
            whole = encoder.compute_position_bias(torch.empty(1, self.most, 1, device=place))[0]
        # By distance, from `1 - most` to `most - 1`.
        self.register_buffer("table", torch.cat([whole[:, 1:, 0].flip(1), whole[:, 0]], dim=1).contiguous())

    def further(self, borders: torch.Tensor) -> dict[str, Any]:
        """The blocks of rows, made once: neither column counts the time that takes."""
        count = int(borders[-1])
        row = torch.bucketize(torch.arange(count, device=borders.device), borders, right=True)

        def same(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
            return row[query] == row[key]

        return {"mask": create_block_mask(same, None, None, count, count, device=borders.device.type)}

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, borders: torch.Tensor, longest: int, mask: Any
    ) -> torch.Tensor:
        """As `PackedModel.forward`."""
        table, most = self.table, self.most

        def biased(score: Any, _batch: Any, head: Any, query: Any, key: Any) -> Any:
            return score + table[head, (key - query + (most - 1)).clamp(0, 2 * most - 2)]

        states = self.model.mpnet.embeddings(input_ids=ids, position_ids=positions)
        for layer in self.model.mpnet.encoder.layer:
            attention = layer.attention
            own = attention.attn
            query, key, value = (
                part(states).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (own.q, own.k, own.v)
            )
            found: Any = flex_attention(query, key, value, score_mod=biased, block_mask=mask)
            attended = attention.LayerNorm(own.o(found.transpose(1, 2).flatten(2)) + states)
            states = layer.output(layer.intermediate(attended), attended)
        logits: torch.Tensor = self.model.classifier(states[0].index_select(0, borders[:-1])[:, None])
        return logits


def packed_model(model: Any) -> PackedModel | PackedMpnet:
    """A model of either family on packed tokens."""
    return PackedMpnet(model) if hasattr(model, "mpnet") else PackedModel(model)


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    borders: torch.Tensor,
    longest: int,
    scaling: float | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """`query, key, value [1, heads, tokens, size]` to `[1, tokens, heads, size]`; on a CPU by a mask of blocks."""
    if query.device.type == "cpu":
        tokens = torch.arange(query.shape[2])
        row = torch.bucketize(tokens, borders, right=True)
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=row[:, None] == row, scale=scaling
        )
        return output.transpose(1, 2), None
    from torch.nn.attention.varlen import varlen_attn

    # Its scale is that of RoBERTa; not every version of torch takes another one.
    query, key, value = (it[0].transpose(0, 1).contiguous() for it in (query, key, value))
    found: Any = varlen_attn(query, key, value, borders, borders, longest, longest)
    return found[None], None


def packed_contender(
    name: str, model: PackedModel | PackedMpnet, inputs: Inputs, device: str, compiled: bool
) -> Contender:
    """As `torch_contender`, on the tokens of the batch alone."""
    mode = "reduce-overhead" if device == "cuda" else "default"
    call = torch.compile(model, mode=mode, dynamic=False) if compiled else model
    packed = _pack(inputs)
    longest = int(inputs["attention_mask"].sum(axis=1).max())
    host = {key: pinned(values, device) for key, values in packed.items()}
    place = {key: tensor.to(device) for key, tensor in host.items()}
    further = model.further(place["borders"])

    def answer() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = call(**place, longest=longest, **further)
        wait(device)
        return logits

    def whole() -> np.ndarray:
        for key, values in _pack(inputs).items():
            host[key].numpy()[:] = values
            place[key].copy_(host[key], non_blocking=True)
        logits: np.ndarray = answer().float().cpu().numpy()
        return logits

    def run() -> None:
        answer()

    return Contender(name, run, whole, packed["ids"].shape[1])


def _pack(inputs: Inputs) -> dict[str, np.ndarray]:
    mask = inputs["attention_mask"] != 0
    lengths = mask.sum(axis=1)
    # Both models count positions from behind its padding token's number.
    positions = np.concatenate([np.arange(length) for length in lengths]) + 2
    borders = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return {"ids": inputs["input_ids"][mask][None], "positions": positions[None].astype(np.int64), "borders": borders}


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, lambda *_args, **_options: None)
