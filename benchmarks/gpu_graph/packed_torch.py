"""PyTorch on packed batches: the tokens of all rows as one, attention by `torch.nn.attention.varlen`."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.gpu_graph.running import Contender, pinned, wait
from benchmarks.gpu_graph.shapes import Inputs

NAME = "qrlora_varlen"
PACKED_EAGER, PACKED_COMPILED = "torch eager, packed", "torch.compile, packed"


class PackedModel(nn.Module):
    """A RoBERTa classifier on `[1, tokens]`; MPNet has a bias by position, which varlen attention does not take.

    Args:
        model: switched to varlen attention, in place.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.set_attn_implementation(NAME)
        self.model = model

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, borders: torch.Tensor, longest: int) -> torch.Tensor:
        """`ids` and `positions [1, tokens]` int64, `borders [rows + 1]` int32, to logits `[rows, labels]`."""
        states = self.model.base_model(
            input_ids=ids, position_ids=positions, borders=borders, longest=longest
        ).last_hidden_state
        logits: torch.Tensor = self.model.classifier(states[0].index_select(0, borders[:-1])[:, None])
        return logits


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


def packed_contender(name: str, model: PackedModel, inputs: Inputs, device: str, compiled: bool) -> Contender:
    """As `torch_contender`, on the tokens of the batch alone."""
    mode = "reduce-overhead" if device == "cuda" else "default"
    call = torch.compile(model, mode=mode, dynamic=False) if compiled else model
    packed = _pack(inputs)
    longest = int(inputs["attention_mask"].sum(axis=1).max())
    host = {key: pinned(values, device) for key, values in packed.items()}
    place = {key: tensor.to(device) for key, tensor in host.items()}

    def answer() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = call(**place, longest=longest)
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
    # RoBERTa counts positions from behind its padding token's number.
    positions = np.concatenate([np.arange(length) for length in lengths]) + 2
    borders = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return {"ids": inputs["input_ids"][mask][None], "positions": positions[None].astype(np.int64), "borders": borders}


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, lambda *_args, **_options: None)
