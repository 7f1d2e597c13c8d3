"""What PyTorch answers: rows of different lengths, a customer in each, behind their prompts and behind 64 forced steps.

Every row is computed alone, without padding and without a cache, by transformers' own forward with side branches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.adapter import QRLoRALinear, detach, insert, set_coefficients
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE, TableLayout
from qrlora_deploy.runtime.verification.forced import COLUMNS, FOLLOWING, TOP
from qrlora_deploy.runtime.verification.parity import Case

STEPS = 64
"""Tokens that every row is made to say."""

LENGTHS = (23, 5, 40, 11)
"""Tokens of the prompts, at most."""

SLOTS = (1, 0, 2, 3)
"""Who has which row; the customer in slot 0 is the base."""

KEPT_COLUMNS = 1024
"""Tokens whose logits a bundle carries, evenly over the vocabulary; all of them would be most of a bundle."""

NAME = "right padding"

MIN_EFFECT = 0.5
"""What a made-up customer's effect on the logits is at least (root mean square), by their standard deviation."""

SCALES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Mean absolute coefficients that are tried, in this order. Signs are drawn, so larger ones than the last make a model
that is so far from any trained one that fp32 itself loses digits: at 1.5 PyTorch's logits are 20 times as far off."""


@dataclass(frozen=True)
class Rows:
    """Prompts and what each is made to say.

    Attributes:
        prompts: token ids of each row.
        following: `[rows, steps]` int64.
        padding: what stands behind the shorter prompts.
    """

    prompts: list[np.ndarray]
    following: np.ndarray
    padding: int

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Of a case, without the customers."""
        longest = max(map(len, self.prompts))
        gaps = [(0, longest - len(prompt)) for prompt in self.prompts]
        ids = [np.pad(ids, gap, constant_values=self.padding) for ids, gap in zip(self.prompts, gaps, strict=True)]
        mask = [np.pad(np.ones_like(ids), gap) for ids, gap in zip(self.prompts, gaps, strict=True)]
        return {"input_ids": np.stack(ids), "attention_mask": np.stack(mask), FOLLOWING: self.following}


def choose_rows(tokenizer: Any, texts: Sequence[str], positions: int, padding: int) -> Rows:
    """Rows of real text, as long as the model takes.

    Args:
        tokenizer: of the base.
        texts: real ones; repeated where they are too few.
        positions: tokens of the longest text.
        padding: id of the token that fills rows up.

    Raises:
        InputError: the model takes next to no tokens, or the tokenizer makes none.
    """
    steps = min(STEPS, positions // 2)
    lengths = [max(1, min(length, positions - steps)) for length in LENGTHS]
    tokens = np.array([token for text in texts for token in tokenizer(text)["input_ids"]], dtype=np.int64)
    if not tokens.size or not steps:
        raise InputError("there is no text to check the export with")
    tokens = np.resize(tokens, sum(lengths) + len(lengths) * steps)
    parts = np.split(tokens, np.cumsum(lengths))
    return Rows(list(parts[:-1]), parts[-1].reshape(len(lengths), steps), padding)


class Forward:
    """A model of transformers with side branches; made by `lend`."""

    def __init__(self, model: Any, basis: Basis, adapters: dict[str, QRLoRALinear]) -> None:
        self._model, self._basis, self._adapters = model, basis, adapters

    def logits(self, values: np.ndarray, tokens: np.ndarray, kept: int) -> np.ndarray:
        """`[kept, vocabulary]` fp32 of the last tokens of one row, with coefficients `values [total_rank]`."""
        set_coefficients(self._adapters, self._basis, values)
        with torch.no_grad():
            found = self._model(torch.from_numpy(tokens)[None], use_cache=False).logits[0, -kept:]
        return np.asarray(found.float().numpy())

    def row(self, rows: Rows, index: int, values: np.ndarray) -> np.ndarray:
        """`[steps + 1, vocabulary]` of a row, behind its prompt and behind each step."""
        following = rows.following[index]
        return self.logits(values, np.concatenate([rows.prompts[index], following]), len(following) + 1)


@contextmanager
def lend(model: Any, basis: Basis) -> Iterator[Forward]:
    """Side branches in a model, for a while."""
    adapters = insert(model, basis)
    try:
        yield Forward(model, basis, adapters)
    finally:
        detach(model)


def customers_of(forward: Forward, rows: Rows, total_rank: int) -> np.ndarray:
    """`[slots, total_rank]` fp32: the base, and made-up customers that move the logits about as trained ones do."""
    random = np.random.default_rng(20)
    shape = (max(SLOTS), total_rank)
    drawn = random.choice([-1.0, 1.0], shape) * random.uniform(0.5, 1.5, shape)
    zero, prompt = np.zeros(total_rank, np.float32), max(rows.prompts, key=len)
    base = forward.logits(zero, prompt, 1)

    def strengthened(row: np.ndarray) -> np.ndarray:
        scaled = [(scale * row).astype(np.float32) for scale in SCALES]
        effects = (np.linalg.norm(forward.logits(one, prompt, 1) - base) for one in scaled)
        strong = MIN_EFFECT * base.std() * base.size**0.5
        return next((one for one, effect in zip(scaled, effects, strict=True) if effect >= strong), scaled[-1])

    return np.stack([zero, *map(strengthened, drawn)])


def make_case(
    forward: Forward, rows: Rows, customers: np.ndarray, layout: TableLayout | None, slots: Sequence[int] = SLOTS
) -> Case:
    """PyTorch's answers to all rows.

    Args:
        forward: the model.
        rows: what is read and said.
        customers: `[slots, total_rank]`.
        layout: of the coefficient table; None: the graph has none.
        slots: the customer of each row.
    """
    zero = np.zeros_like(customers[0])
    whole = [forward.row(rows, index, customers[slot]) for index, slot in enumerate(slots)]
    base = [forward.row(rows, index, zero) for index in range(len(slots))]
    columns = np.unique(np.linspace(0, whole[0].shape[-1] - 1, KEPT_COLUMNS).astype(np.int64))
    inputs = rows.inputs | {COLUMNS: columns, TOP: np.stack([logits.argmax(axis=-1) for logits in whole])}
    if layout is not None:
        table = np.stack([layout.row(values) for values in customers])
        inputs |= {TABLE: table, SLOT: np.array(slots, dtype=np.int64)}
    logits, base_logits = (np.stack([one[:, columns] for one in part]) for part in (whole, base))
    return Case(NAME, inputs, logits, base_logits)
