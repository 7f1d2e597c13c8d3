"""Random models of known shapes, and batches whose rows have uneven lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.common.shapes import SHAPES, random_classifier
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.rank_rules.fixed_rank import FixedRank

VOCABULARIES = {"roberta": 50265, "mpnet": 30527, "minilm": 30522}
TINY = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 514,
}
SIZES: dict[str, tuple[str, dict[str, int]]] = {
    **{name: (family, sizes | {"vocab_size": VOCABULARIES[name]}) for name, (family, sizes) in SHAPES.items()},
    "tiny": ("Roberta", TINY),
    "tiny-mpnet": ("MPNet", TINY),
}
PAD = 1
"""Padding token of RoBERTa and MPNet, used for all."""

MEDIAN_SHARE, SPREAD, SMALLEST_SHARE = 0.45, 0.4, 0.06
"""Lengths of rows as shares of the padded length: log-normal, as lengths of sentence pairs in GLUE are,
with this median and spread, cut to [SMALLEST_SHARE, 1]; the longest row is full. Means are near a half."""

Inputs = dict[str, np.ndarray]


def make_model(shape: str) -> Any:
    """A classifier of the shape with random weights, fp32, whose logits are of the order of 1."""
    family, sizes = SIZES[shape]
    model = random_classifier(family, sizes | {"num_labels": 3, "pad_token_id": PAD}).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                # Sums of products of the order of 1, so that attention has something to choose between.
                weight.normal_(std=weight.shape[-1] ** -0.5 * (4.0 if "classifier" in name else 1.0))
    return model.requires_grad_(False)


def make_inputs(shape: str, batch: int, length: int, seed: int = 1) -> Inputs:
    """Right-padded rows of uneven lengths, int64 `[batch, length]` each; one row is full."""
    random = np.random.default_rng(seed)
    shares = np.clip(random.lognormal(np.log(MEDIAN_SHARE), SPREAD, batch), SMALLEST_SHARE, 1)
    shares[shares.argmax()] = 1
    lengths = np.maximum(2, np.round(shares * length)).astype(int)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    ids = random.integers(5, SIZES[shape][1]["vocab_size"], (batch, length))
    inputs = {"input_ids": np.where(mask == 1, ids, PAD), "attention_mask": mask}
    return inputs | ({"token_type_ids": np.zeros_like(mask)} if SIZES[shape][0] == "Bert" else {})


@dataclass(frozen=True)
class Setup:
    """Which layers have a side branch: the last layers of some projections, all of one rank.

    Attributes:
        spread: of the coefficients; in a random model it takes large ones to be seen in the logits.
    """

    projections: Sequence[str]
    last_layers: int
    rank: int
    spread: float


def make_basis(model: Any, setup: Setup) -> Basis:
    """Random orthonormal factors for the projections; their numbers do not matter to the speed."""
    count = model.config.num_hidden_layers
    names = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in setup.projections and isinstance(module, torch.nn.Linear)
    ]
    kept = [name for name in names if any(f".{layer}." in name for layer in range(count - setup.last_layers, count))]
    width = model.config.hidden_size
    rank = min(setup.rank, width)
    torch.manual_seed(2)
    q = torch.linalg.qr(torch.randn(width, rank)).Q.numpy()
    r = torch.linalg.qr(torch.randn(width, rank)).Q.T.contiguous().numpy()
    targets = [BasisTarget(name, q, r, np.ones(width, np.float32), "0" * 64) for name in kept]
    return Basis(tuple(targets), "random", FixedRank(rank), {})
