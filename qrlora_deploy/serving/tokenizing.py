"""From what a request holds, texts or token ids, to rows without padding."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.runtime.bundle.bundle import CONFIG_FILE, Bundle
from qrlora_deploy.runtime.bundle.sealed_facts import read_config_facts
from qrlora_deploy.runtime.prediction.tokenizing import TextEncoder, batches
from qrlora_deploy.serving.engine.rows import Row
from qrlora_deploy.tasks.registry import task_named

IDS, MASK, SEGMENTS = "input_ids", "attention_mask", "token_type_ids"

TOGETHER = 128
"""Texts that are tokenised in one call; they are of similar length, so little is padded in between."""


class RowTokenizer:
    """Makes the rows of a bundle's engine. Safe for many threads.

    Attributes:
        max_length: tokens of a row at most.

    Raises:
        FileFormatError: the tokenizer cannot be opened.
    """

    def __init__(self, bundle: Bundle) -> None:
        facts = read_config_facts(bundle.folder / CONFIG_FILE)
        self.max_length = bundle.manifest.max_length
        self._encoder = TextEncoder(bundle)
        self._names = self._encoder.names
        self._left = bundle.manifest.padding_side == "left"
        self._answers_words = task_named(bundle.manifest.task).answers_words
        self._limits = {IDS: facts.token_rows, SEGMENTS: facts.segment_rows}

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None, customers: Sequence[str | None]) -> list[Row]:
        """The rows of texts, or of pairs of texts, in their order.

        Raises:
            MalformedInputError: a text cannot be read; its number is named.
        """
        if self._answers_words:
            return self._rows_with_words(texts, pairs, customers)
        found: dict[int, Row] = {}
        size = TOGETHER if MASK in self._names else 1
        for numbers in batches(texts, pairs, size):
            seconds = None if pairs is None else [pairs[number] for number in numbers]
            inputs = self._encoder.encode([texts[number] for number in numbers], seconds, numbers)
            owners = [customers[number] for number in numbers]
            found.update(zip(numbers, self._unpadded(inputs, owners), strict=True))
        return [found[number] for number in range(len(texts))]

    def _rows_with_words(
        self, texts: Sequence[str], pairs: Sequence[str] | None, customers: Sequence[str | None]
    ) -> list[Row]:
        """One text at a time: words are found by the numbers of tokens, which padding may move."""
        if pairs is not None:
            raise MalformedInputError("this model tags the words of one text and takes no pairs")
        rows = []
        for number, (text, customer) in enumerate(zip(texts, customers, strict=True)):
            inputs, (words,) = self._encoder.encode_words([text], [number])
            rows.append(Row({name: inputs[name][0] for name in self._names}, customer, words))
        return rows

    def rows_of_ids(self, inputs: Mapping[str, np.ndarray], customers: Sequence[str | None]) -> list[Row]:
        """The rows of token ids, as a client tokenised them.

        Args:
            inputs: `input_ids`, and `attention_mask` and `token_type_ids` where they are not all ones and all
                zeros; int64 `[n, length]` each, padded on the bundle's side, with a mask of 0 there.
            customers: one for each row.

        Raises:
            MalformedInputError: they are no such arrays, too long, or hold what the model has no row for. One bad
                row would fail the rows of others in its batch, so all is looked at here.
        """
        ids = inputs[IDS]
        if ids.ndim != 2 or 0 in ids.shape:
            raise MalformedInputError(f"{IDS} must have the shape [rows, length], not {list(ids.shape)}")
        filled = {MASK: np.ones_like(ids), SEGMENTS: np.zeros_like(ids)} | dict(inputs)
        for name, array in filled.items():
            if array.shape != ids.shape:
                raise MalformedInputError(f"{name} has the shape {list(array.shape)}, but {IDS} {list(ids.shape)}")
        self._check_values(filled)
        rows = list(self._unpadded({name: filled[name] for name in {*self._names, MASK}}, customers))
        for number, row in enumerate(rows):
            if row.length > self.max_length:
                raise MalformedInputError(f"row {number} has {row.length} tokens, the model takes {self.max_length}")
        return rows

    def _check_values(self, inputs: Mapping[str, np.ndarray]) -> None:
        mask = inputs[MASK]
        if ((mask != 0) & (mask != 1)).any():
            raise MalformedInputError(f"{MASK} must hold 0 and 1 alone")
        if not mask.any(axis=1).all():
            raise MalformedInputError(f"{MASK} has a row of zeros alone; each row needs a token that is read")
        for name, limit in self._limits.items():
            if inputs[name].min() < 0 or (limit is not None and inputs[name].max() >= limit):
                raise MalformedInputError(f"{name} must be from 0 to {(limit or 2**31) - 1}, where the model has rows")

    def _unpadded(self, inputs: Mapping[str, np.ndarray], customers: Sequence[str | None]) -> Iterator[Row]:
        names = self._names
        for number, customer in enumerate(customers):
            kept = self._kept(inputs[MASK][number]) if MASK in inputs else slice(None)
            yield Row({name: inputs[name][number, kept] for name in names}, customer)

    def _kept(self, mask: np.ndarray) -> slice:
        """Without the padding of the bundle's side: what else a mask hides may move positions, and stays."""
        seen = np.flatnonzero(mask)
        return slice(int(seen[0]), None) if self._left else slice(0, int(seen[-1]) + 1)
