"""That a decoder reads forward alone: no token sees what comes behind it, and none of another packed row."""

from collections.abc import Sequence
from typing import Any

import torch

from qrlora_deploy.errors import InputError, argument, library_errors
from qrlora_deploy.training.rows import Row

TOKENS = 16
"""Of a row that is looked at."""


def check_reads_forward(model: Any, rows: Sequence[Row], packed: bool) -> None:
    """Try a model on the beginnings of two rows, whatever its family.

    Args:
        model: in evaluation mode.
        rows: from `answer_rows`.
        packed: whether rows will share rows of a batch.

    Raises:
        InputError: a token sees later ones, as in an encoder, so that answers would be learned from themselves; or
            packed rows see each other.
    """
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    ids = [row["input_ids"][:TOKENS] for row in (longest, rows[0])]
    with torch.no_grad(), library_errors(f"{type(model).__name__} cannot be tried", InputError):
        alone = [_logits(model, [row]) for row in ids]
        half = (len(ids[0]) + 1) // 2
        forward = _agree(_logits(model, [ids[0][:half]]), alone[0][:half])
        apart = not packed or _agree(_packed(model, ids), torch.cat(alone))
    if not forward:
        raise InputError(f"{type(model).__name__} sees the tokens that it is to write: it is no decoder")
    if not apart:
        raise InputError(
            f"{argument('packing', True)}: {type(model).__name__} does not keep packed rows apart; leave it out"
        )


def _logits(model: Any, ids: list[list[int]], **more: Any) -> torch.Tensor:
    """`[tokens, vocabulary]` of one row."""
    batch = torch.tensor(ids, device=next(model.parameters()).device)
    found: torch.Tensor = model(input_ids=batch, use_cache=False, **more).logits[0]
    return found


def _packed(model: Any, ids: Sequence[list[int]]) -> torch.Tensor:
    device = next(model.parameters()).device
    places = torch.tensor([[place for row in ids for place in range(len(row))]], device=device)
    return _logits(model, [[token for row in ids for token in row]], position_ids=places)


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to roundings."""
    bound = 1e-3 if expected.dtype == torch.float32 else 0.1
    return float((found - expected).float().abs().max()) <= bound * (float(expected.float().std()) or 1.0)
