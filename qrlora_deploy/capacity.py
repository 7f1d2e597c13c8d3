"""What a model can take of a tokenizer: one answer for training and for every exporter."""

import math
from typing import Any

UNKNOWN_MAX_TOKENS = 512
"""Where neither the tokenizer nor the model names a limit."""

LARGEST_LIMIT = 2**30
"""transformers writes 10^30 where a tokenizer has no limit."""


def max_tokens(model: Any, tokenizer: Any) -> int:
    """How many tokens of a text the model takes, special ones included.

    RoBERTa and its kin begin counting positions behind the padding index, so their tables hold
    fewer positions than their size says. Phi-3 and its kin turn longer texts by another table of
    angles; a graph has the first alone.

    Args:
        model: a model, which may live on the meta device.
        tokenizer: that goes with it.

    Returns:
        The smaller of both limits, `UNKNOWN_MAX_TOKENS` where there is none.
    """
    limits = [tokenizer.model_max_length, _positions(model), _first_angles(model.config)]
    known = [limit for limit in limits if _is_limit(limit)]
    return int(min(known, default=UNKNOWN_MAX_TOKENS))


def _positions(model: Any) -> float | None:
    positions: Any = getattr(model.config, "max_position_embeddings", None)
    if not _is_limit(positions):
        return None
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    used = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return max(1.0, positions - max(used, default=0))


def _first_angles(config: Any) -> int | None:
    """Up to how many tokens the first table of angles is used, where the length of a text chooses it."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "longrope":
        return None
    own = rope.get("original_max_position_embeddings")
    found: int | None = own or getattr(config, "original_max_position_embeddings", None)
    return found


def _is_limit(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 < value < LARGEST_LIMIT
