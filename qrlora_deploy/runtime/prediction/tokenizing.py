"""Text to the inputs of a bundle's graph, by its own tokenizer and without transformers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from qrlora_deploy.errors import FileFormatError, InputError, MalformedInputError
from qrlora_deploy.runtime.bundle.bundle import TOKENIZER_FILE, Bundle
from qrlora_deploy.runtime.bundle.sealed_facts import CONFIG_FILE, read_config_facts
from qrlora_deploy.tokenization.text_cut import TextCutter
from qrlora_deploy.tokenization.words import LocatedWords, Place, locate, moved, shift_of, words_of

TEXT_INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
"""Inputs of a graph, and the attribute of an encoding that each comes from."""

BLOCK = 2**20
"""Characters that are looked at together."""


class TextEncoder:
    """The tokenizer of a bundle, padding and cutting as the manifest says.

    Raises:
        FileFormatError: the tokenizer cannot be opened.
    """

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        path = bundle.folder / TOKENIZER_FILE
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The library raises plain `Exception`.
        except Exception as error:
            raise FileFormatError(f"{path} is not a tokenizer: {error}") from error
        tokenizer.enable_truncation(manifest.max_length, direction=manifest.truncation_side)
        tokenizer.enable_padding(
            direction=manifest.padding_side,
            pad_id=manifest.pad_token_id,
            pad_type_id=manifest.pad_token_type_id,
            pad_token=tokenizer.id_to_token(manifest.pad_token_id) or "[PAD]",
        )
        self.tokenizer = tokenizer
        self.names = [record.name for record in manifest.inputs if record.name in TEXT_INPUTS]
        self._cutter = TextCutter(tokenizer, manifest.max_length, manifest.truncation_side)
        facts = read_config_facts(bundle.folder / CONFIG_FILE)
        self._rows = {"input_ids": facts.token_rows, "token_type_ids": facts.segment_rows}

    @property
    def vocabulary(self) -> int:
        """Ids that the tokenizer makes and the model has a row for."""
        size: int = self.tokenizer.get_vocab_size()
        return min(size, self._rows["input_ids"] or size)

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, numbers: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """The inputs, int64 `[batch, length]` each, padded to the longest text.

        Memory and time are bounded by the manifest's `max_length`, however long a text is (`TextCutter`).

        Args:
            numbers: of the texts, for messages; from 0 on if None.

        Raises:
            InputError: a text is of another type, not Unicode, gives too few tokens for its length, or one
                that the model has no row for.
        """
        numbers = range(len(texts)) if numbers is None else numbers
        check_texts(texts, numbers, "text")
        check_texts(pairs or (), numbers, "pair")
        texts, pairs = self._cutter.cut(texts, pairs, numbers)
        return self._inputs(texts if pairs is None else list(zip(texts, pairs, strict=True)), numbers)[0]

    def encode_words(
        self,
        texts: Sequence[str],
        numbers: Sequence[int] | None = None,
        words: Sequence[Sequence[Place]] | None = None,
    ) -> tuple[dict[str, np.ndarray], list[LocatedWords]]:
        """As `encode`, and the words of each text by its tokens.

        Args:
            texts: one or more.
            numbers: of the texts, for messages; from 0 on if None.
            words: the places of their words; `words_of` as much of each text as can be read if None.

        Raises:
            InputError: as `encode`.
        """
        numbers = range(len(texts)) if numbers is None else numbers
        check_texts(texts, numbers, "text")
        cut, _ = self._cutter.cut(texts, None, numbers)
        shifts = [shift_of(text, part) for text, part in zip(texts, cut, strict=True)]
        # A text out of whose middle something was taken has its tokens elsewhere; it is read whole.
        read = [text if shift is None else part for text, part, shift in zip(texts, cut, shifts, strict=True)]
        inputs, encodings = self._inputs(read, numbers)
        located = []
        for row, (text, shift, encoding) in enumerate(zip(texts, shifts, encodings, strict=True)):
            places = moved(words_of(read[row]), shift or 0) if words is None else words[row]
            located.append(locate(text, places, moved(encoding.offsets, shift or 0)))
        return inputs, located

    def _inputs(self, batch: list[Any], numbers: Sequence[int]) -> tuple[dict[str, np.ndarray], list[Any]]:
        """The inputs of texts or pairs that were checked and cut, and their encodings."""
        encodings = self.tokenizer.encode_batch(batch)
        inputs = {
            name: np.array([getattr(encoding, TEXT_INPUTS[name]) for encoding in encodings], dtype=np.int64)
            for name in self.names
        }
        for name, rows in self._rows.items():
            # An id without a row would fail the whole batch, in the runtime's own words.
            if rows is not None and name in inputs and inputs[name].max(initial=0) >= rows:
                _check_rows(encodings, numbers, name, rows)
        return inputs, encodings


def _check_rows(encodings: Sequence[Any], numbers: Sequence[int], name: str, rows: int) -> None:
    for number, encoding in zip(numbers, encodings, strict=True):
        used = zip(getattr(encoding, TEXT_INPUTS[name]), encoding.tokens, encoding.attention_mask, strict=True)
        value, token = max(((value, token) for value, token, seen in used if seen), default=(0, ""))
        if value >= rows:
            what = f"the token {token[:40]!r} has the id" if name == "input_ids" else "a second text has the segment"
            raise MalformedInputError(
                f"text {number}: {what} {value}, but the model of this bundle has {rows} rows for them; take it out, "
                f"or export a model whose embedding was resized"
            )


def as_texts(texts: Iterable[str], what: str) -> list[str]:
    """The texts as a list.

    Raises:
        InputError: they are one text, of which each letter would be a text, or no texts.
    """
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise MalformedInputError(
            f"{what} must be a list of texts, not {type(texts).__name__}; put one text into a list"
        )
    return list(texts)


def check_texts(texts: Sequence[Any], numbers: Sequence[int], what: str) -> None:
    """Make sure that the texts are texts.

    Raises:
        InputError: one is of another type or holds half of a surrogate pair; its number is named.
    """
    for number, text in zip(numbers, texts, strict=False):
        if not isinstance(text, str):
            raise MalformedInputError(f"{what} {number} is of the type {type(text).__name__}, not a text")
        if not _is_unicode(text):
            raise MalformedInputError(f"{what} {number} is not valid Unicode: it holds half of a surrogate pair")


def _is_unicode(text: str) -> bool:
    try:
        # In blocks: a copy of all of it would take as much memory again.
        return text.isascii() or all(
            text[start : start + BLOCK].encode("utf-8") is not None for start in range(0, len(text), BLOCK)
        )
    except UnicodeEncodeError:
        return False


def batches(texts: Sequence[str], pairs: Sequence[str] | None, size: int) -> Iterator[list[int]]:
    """Row numbers in batches of `size`; texts of similar length share one, so little is padded.

    Raises:
        InputError: the numbers of texts and pairs differ, or the size is not positive.
    """
    if pairs is not None and len(pairs) != len(texts):
        raise MalformedInputError(f"there are {len(texts)} texts but {len(pairs)} second texts")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"the batch size must be a whole number of at least 1, not {size!r:.40}")
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]) + len(pairs[row] if pairs else ""))
    for start in range(0, len(order), size):
        yield order[start : start + size]
