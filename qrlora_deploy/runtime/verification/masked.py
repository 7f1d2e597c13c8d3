"""Decoders that take an attention mask: rows are read at once as they are padded, then made to say given tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE

MASK = "attention_mask"
PAST, PRESENT = "past_key_values", "present"
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def takes_mask(session: Any) -> bool:
    """Whether a decoder's graph has the inputs that other clients know."""
    return any(value.name == MASK for value in session.get_inputs())


def run_masked(session: Any, inputs: Mapping[str, np.ndarray], following: np.ndarray) -> np.ndarray:
    """Logits `[rows, steps + 1, vocabulary]` fp32 behind the prompts and behind each step; the cache grows.

    Args:
        session: of a decoder that takes a mask.
        inputs: `input_ids` and `attention_mask [rows, tokens]`, and what the graph has of customers.
        following: `[rows, steps]`, what each row is made to say.
    """
    ids, mask = inputs["input_ids"].astype(np.int64), inputs[MASK].astype(np.int64)
    rows = len(ids)
    further = {name: inputs[name] for name in (TABLE, SLOT) if name in inputs}
    known = {value.name for value in session.get_inputs()}
    past = {
        value.name: np.zeros([rows, value.shape[1], 0, value.shape[3]], DTYPES[value.type])
        for value in session.get_inputs()
        if value.name.startswith(PAST)
    }
    outputs = ["logits", *(name.replace(PAST, PRESENT, 1) for name in past)]
    found: list[np.ndarray] = []
    for tokens in (ids, *(column[:, None] for column in following.T)):
        if found:
            mask = np.concatenate([mask, np.ones([rows, 1], np.int64)], axis=1)
        places = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -tokens.shape[1] :]
        own = {"input_ids": tokens, MASK: mask, "position_ids": places}
        own = {name: array for name, array in own.items() if name in known}
        logits, *present = session.run(outputs, own | further | past)
        past = dict(zip(past, present, strict=True))
        found.append(logits[np.arange(rows), _last(mask, logits.shape[1])].astype(np.float32))
    return np.stack(found, axis=1)


def _last(mask: np.ndarray, tokens: int) -> np.ndarray:
    """Of each row, which of the `tokens` logits is that of its last token; where there is one, that."""
    own = mask[:, -tokens:]
    return (
        np.where(own.any(axis=1), tokens - 1 - own[:, ::-1].argmax(axis=1), 0)
        if tokens > 1
        else np.zeros(len(mask), int)
    )
