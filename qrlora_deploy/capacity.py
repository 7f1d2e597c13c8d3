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
    fewer positions than their size says.

    Args:
        model: a model, which may live on the meta device.
        tokenizer: that goes with it.

    Returns:
        The smaller of both limits, `UNKNOWN_MAX_TOKENS` where there is none.
    """
    limits = [tokenizer.model_max_length, _positions(model)]
    known = [limit for limit in limits if _is_limit(limit)]
    return int(min(known, default=UNKNOWN_MAX_TOKENS))


def _positions(model: Any) -> float | None:
    positions: Any = getattr(model.config, "max_position_embeddings", None)
    if not _is_limit(positions):
        return None
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    used = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return max(1.0, positions - max(used, default=0))


def _is_limit(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 < value < LARGEST_LIMIT
