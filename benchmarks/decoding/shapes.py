"""Decoders of known shapes with random weights, and bases of the ranks that such models have; nothing is fetched."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.rank_rules.fixed_rank import FixedRank

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
TARGETS: dict[str, tuple[str, ...]] = {"none": (), "qv": ("q", "v"), "all": LINEAR}
"""Which layers of a block have a branch, by the name of a graph."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of Llama's family.

    Attributes:
        config: of transformers.
        ranks: of the basis, by the layers of `LINEAR`.
    """

    config: dict[str, Any]
    ranks: tuple[int, ...]


def _config(hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, theta: float) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


SHAPES = {
    "llama-3.2-1b": Shape(_config(2048, 16, 32, 8, 8192, 128256, 5e5), (160,) * 7),
    # The medians of tau = 0.5 on the model itself.
    "smollm2-135m": Shape(_config(576, 30, 9, 3, 1536, 49152, 1e5), (112, 48, 56, 112, 224, 232, 152)),
    "tiny": Shape(_config(64, 2, 4, 2, 96, 320, 1e4), (24, 16, 16, 24, 24, 16, 24)),
}


def save_model(folder: Path, shape: Shape, dtype: torch.dtype, device: str) -> Checkpoint:
    """Write a model with seeded weights that keep the hidden state's size, so that rounding shows in its logits."""
    config = LlamaConfig(**shape.config, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model: Any = LlamaForCausalLM(config)
        model = model.to(dtype)
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.normal_(0, weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return open_checkpoint(str(folder))


def make_basis(checkpoint: Checkpoint, shape: Shape, targets: tuple[str, ...], sealed: bool = False) -> Basis:
    """Random factors of about the shape's ranks for these layers of every block.

    Args:
        sealed: with the digests of the layers' weights, which an export compares.
    """
    random = np.random.default_rng(1)
    made = []
    for block in range(shape.config["num_hidden_layers"]):
        for layer, rank in zip(LINEAR, shape.ranks, strict=True):
            if layer not in targets:
                continue
            part = "self_attn" if layer in "qkvo" else "mlp"
            name = f"model.layers.{block}.{part}.{layer}_proj"
            out, width = checkpoint.stored[f"{name}.weight"].shape
            # Not the same everywhere, as in a real basis.
            rank = min(rank + 8 * (block % 3 - 1), out)
            q = random.standard_normal((out, rank), dtype=np.float32) * out**-0.5
            r = random.standard_normal((rank, width), dtype=np.float32) * width**-0.5
            digest = checkpoint.tensor_digest(f"{name}.weight") if sealed else ""
            made.append(BasisTarget(name, q, r, np.ones(min(out, width), dtype=np.float32), digest))
    return Basis(tuple(made), checkpoint.name, FixedRank(max(shape.ranks)), {})


def make_customers(basis: Basis, count: int) -> np.ndarray:
    """`[count, total_rank]` fp32; the first one is the base. Their effect is about as large as the logits' spread."""
    blocks = len({target.name.split(".")[2] for target in basis.targets}) or 1
    per_block = len(basis.targets) / blocks
    values = np.random.default_rng(2).standard_normal((count, basis.total_rank), dtype=np.float32)
    values *= 0.5 / max(1.0, per_block)
    values[0] = 0
    return values
