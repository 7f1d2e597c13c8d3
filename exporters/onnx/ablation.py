"""Whether the parity check could have failed: what its texts cannot tell is named, not taken for proven.

A graph whose soft cap is missing agrees with PyTorch to within the bound where no score comes near the cap, and one
without its window where no text is longer. So the model that was traced runs once more without each such
feature: where its logits stay within the bound, agreement says nothing about the feature.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from exporters.onnx.attention import HEADS, UNCAPPED
from qrlora_deploy.models.capacity import narrowest_window
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, kept_tokens
from qrlora_deploy.runtime.verification.parity import Case, shows_customers

CUSTOMERS, WINDOW, SOFT_CAP = "customers", "attention window", "soft cap"
WIDE = 2**20
"""A window that no text fills."""


def not_shown(traced: Any, reference: Sequence[Case], bound: float, least_size: float = 1.0) -> tuple[str, ...]:
    """What could be missing in the graph without the check failing.

    Args:
        traced: the wrapper that the graph was traced from; takes its inputs by position, and has their `names`.
        reference: the cases that the graph agreed with.
        bound: largest error of a logit that was allowed.
        least_size: as of `Task`.
    """
    missing = [] if shows_customers(reference, least_size) else [CUSTOMERS]
    features: list[tuple[str, bool, Callable[[Any], AbstractContextManager[None]]]] = [
        (WINDOW, narrowest_window(traced.model.config) is not None, _without_window),
        (SOFT_CAP, bool(_capped(traced.model)), _without_cap),
    ]
    for name, present, without in features:
        if present and not _moves(traced, reference, without, bound):
            missing.append(name)
    return tuple(missing)


def _moves(
    traced: Any, reference: Sequence[Case], without: Callable[[Any], AbstractContextManager[None]], bound: float
) -> bool:
    """Whether some logit of some case is more than `bound` away where a feature is left out."""
    for case in reference:
        whole = _answer(traced, case)
        with without(traced.model):
            bare = _answer(traced, case)
        present = np.isfinite(case.logits)
        # An error of the graph may lie on the other side, so the bound alone is not enough.
        if np.abs(whole[present] - bare[present]).max(initial=0) > 2 * bound:
            return True
    return False


def _answer(traced: Any, case: Case) -> np.ndarray:
    inputs = case.inputs
    if traced.packing is not None:
        inputs = inputs | {TOKEN_INDEX: kept_tokens(inputs["attention_mask"])}
    with torch.no_grad():
        logits: np.ndarray = traced(*(torch.from_numpy(inputs[name]) for name in traced.names)).numpy()
    return logits


def _capped(model: Any) -> list[Any]:
    return [
        module for module in model.modules() if hasattr(module, HEADS) and getattr(module, HEADS).softcap is not None
    ]


@contextmanager
def _without_window(model: Any) -> Iterator[None]:
    # ModernBERT derives the one from the other.
    name = "local_attention" if isinstance(getattr(model.config, "local_attention", None), int) else "sliding_window"
    window = getattr(model.config, name)
    setattr(model.config, name, WIDE)
    try:
        yield
    finally:
        setattr(model.config, name, window)


@contextmanager
def _without_cap(model: Any) -> Iterator[None]:
    modules = _capped(model)
    for module in modules:
        setattr(module, UNCAPPED, True)
    try:
        yield
    finally:
        for module in modules:
            delattr(module, UNCAPPED)
