"""What is asked of the graphs that draw tokens where the logits lie, and what they answer.

The graphs lie beside this module, and `exporters.onnx.decoder.drawing` has written them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("draw.onnx")
"""Looks at all tokens for rows that draw from all, and at the best ones for others."""

FILE_OF_ALL = Path(__file__).with_name("draw_of_all.onnx")
"""Looks at all tokens, for rows whose `top_k` is `MANY`; answers `DRAWN` and `LOGPROB` alone."""

CANDIDATES = 256
"""Best logits of each row that are looked at where not every token may be drawn.

Four times as many take a GPU twice as long for all rows, and are not enough either: a small decoder at temperature 1
and top-p 0.95 keeps more than 256 tokens at one token in four, more than 1,024 at one in fourteen.
"""

TOLD = 20
"""Best tokens whose logs are told at most."""

LOGITS = "logits"
"""The first input, `[rows, vocabulary]` fp32."""

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "share")
"""The other inputs, `[rows, 1]` fp64 each, as `Wish` has them."""

DRAWN, LOGPROB, IDS, LOGPROBS = "drawn", "logprob", "ids", "logprobs"

ANSWERS: dict[str, tuple[Any, int]] = {
    DRAWN: (np.int64, 1),
    LOGPROB: (np.float64, 1),
    IDS: (np.int64, TOLD),
    LOGPROBS: (np.float64, TOLD),
}
"""Outputs `[rows, width]`, with types and widths: the token, or -1 where all logits must be looked at; the log of its
probability by the model alone; the best tokens, and theirs. Of a smaller vocabulary all are told."""

EVERY = 0.0
"""`Wish.top_k` where every token may be drawn; then nothing else bounds them."""

MANY = 2.0**40
"""`Wish.top_k` where the others bound the tokens."""

WHOLE_SHARE = 2.0
"""`Wish.top_p` that keeps all."""


@dataclass(frozen=True)
class Wish:
    """A token that a row wants.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: so many best tokens, up to `CANDIDATES`; or `EVERY`, or `MANY`.
        top_p: the best ones until their probabilities reach this sum.
        min_p: tokens of at least this share of the best one's probability.
        share: in [0, 1), of the probabilities: ids rising, the token where their sum passes it.
        told: None, or how many best tokens are told beside the log of the chosen one.
    """

    temperature: float
    top_k: float
    top_p: float
    min_p: float
    share: float
    told: int | None = None
