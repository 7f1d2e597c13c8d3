"""What a model can take of a tokenizer: one answer for training and for every exporter."""

import math
from collections.abc import Iterable
from typing import Any

from qrlora_deploy.errors import InputError

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


def check_ids(name: str, model: Any, tokenizer: Any, pairs: bool) -> None:
    """Make sure that a model has a row of its embedding for all that its tokenizer makes of a text.

    Args:
        name: of the checkpoint, for messages.
        model: a model, which may live on the meta device.
        tokenizer: that goes with it.
        pairs: whether there are pairs of texts.

    Raises:
        InputError: a token or a segment has no row; the message names it.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    rows = _token_rows(model)
    if rows is not None and largest >= rows:
        raise InputError(
            f"{name}: its tokenizer makes {token!r} token {largest}, but its embedding has {rows} rows; remove what "
            f"was added to the tokenizer, or call model.resize_token_embeddings({largest + 1}) and save the model"
        )
    check_segments(name, segment_rows(model, tokenizer), _segments(tokenizer, pairs))


def _token_rows(model: Any) -> int | None:
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (NotImplementedError, AttributeError):
        return None  # transformers does not know the embedding of this family, or there is none


def segment_rows(model: Any, tokenizer: Any) -> int | None:
    """How many segments a model tells apart; None where the tokenizer makes none or the model has no table of them."""
    if "token_type_ids" not in tokenizer.model_input_names:
        return None
    return next(
        (module.num_embeddings for path, module in model.named_modules() if path.endswith("token_type_embeddings")),
        None,
    )


def check_segments(name: str, rows: int | None, segments: Iterable[int]) -> None:
    """Make sure that the numbers of segments are rows of their table.

    Raises:
        InputError: one is not.
    """
    largest = max(segments, default=0)
    if rows is not None and largest >= rows:
        raise InputError(
            f"{name}: its tokenizer makes segment {largest} of a text or pair, but its token_type_embeddings have "
            f"{rows} rows; take token_type_ids out of model_input_names in tokenizer_config.json"
        )


def _segments(tokenizer: Any, pairs: bool) -> list[int]:
    made = tokenizer("a", "a") if pairs else tokenizer("a")
    return list(made.get("token_type_ids", []))


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


def padding_reach(model: Any) -> int | None:
    """Most padding before a text, where the answer is read at the first token and tokens look only so far.

    A token that sees nothing but padding has no answer that anything could agree with. None: any.
    """
    window = narrowest_window(model.config)
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    return None if window is None or causal else window


def narrowest_window(config: Any) -> int | None:
    """How many tokens before itself a token sees where it sees least; None: all of them."""
    local = getattr(config, "local_attention", None)
    found = [getattr(config, "sliding_window", None), local // 2 if isinstance(local, int) else None]
    windows = [window for window in found if isinstance(window, int) and window > 0]
    return min(windows, default=None)


def _is_limit(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 < value < LARGEST_LIMIT
