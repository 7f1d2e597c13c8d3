"""Texts cut before they are tokenized: as far as the tokens that are kept can depend on them.

A tokenizer takes some 140 bytes and 700 ns for each character, and then throws away all but `max_length`
tokens. So it gets the beginning of a long text alone (the end, where it cuts on the left). The tokens
that are kept are those of the whole text, for one of three reasons:

- The cut is at the end of a word, whatever follows, and enough tokens come before it.
- The model takes words as a whole, and the kept tokens are in words that end well before the cut.
- The model has prefixes (BPE, Unigram): its tokens up to the end of any of them are those of the text up
  to there. Every cut in a window longer than any token gives the same first tokens, and one of these cuts
  is between two tokens of the whole text.

Where none holds the cut moves on, to a bound; rows that give no tokens are shortened before (`long_runs`).
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from qrlora_deploy.errors import InputError
from qrlora_deploy.tokenization.long_runs import SURE_IDEOGRAPHS, LongRuns, Shortened, row_end
from qrlora_deploy.tokenization.tokenizer_facts import TokenizerFacts

MAX_CHARACTERS = 160_000
"""The most that a tokenizer is given of one text, or 32 for each token: 22 MB while it works."""

SAFE = r"(?<=[0-9A-Za-z]) (?=[0-9A-Za-z])"
SAFE_BERT = (
    rf"(?<=[0-9A-Za-z{SURE_IDEOGRAPHS}])(?= ?[{SURE_IDEOGRAPHS}])|(?<=[{SURE_IDEOGRAPHS}])(?= ?[0-9A-Za-z])|{SAFE}"
)
"""Where a word ends whatever follows: no sign here joins its neighbours, in any normal form of Unicode."""

NORMAL_FORMS = {"NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "BertNormalizer"}
MARKS = 32
"""Combining marks that are taken for the end of a word."""

LEAST = 1024
"""Characters that are taken of a text at first, or 8 for each token."""

TRIES = 4
"""Sizes in which the kept tokens may be too few steps from the end to be sure of."""

SEARCHED = 512
"""Characters that are searched for such a place before more of the text is taken."""


class TextCutter:
    """Cuts texts for one tokenizer.

    Args:
        tokenizer: of the library `tokenizers`, set to truncate to `max_length` tokens on `side`.
        max_length: tokens that are kept of a text or a pair.
        side: "right" or "left", where the tokenizer cuts.
    """

    def __init__(self, tokenizer: Any, max_length: int, side: str = "right") -> None:
        self.tokenizer, self.max_length, self.side = tokenizer, max_length, side
        self.short = LEAST + 16 * max_length
        """Characters of a text that is left as it is."""
        self.most = max(MAX_CHARACTERS, 32 * max_length)

    def cut(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, numbers: Sequence[int] | None = None
    ) -> tuple[list[str], list[str] | None]:
        """The texts and pairs, those that are long cut; `numbers` are theirs in messages, from 0 on if None.

        Of a pair whose texts are both cut, the one with more characters has more tokens afterwards: that is
        what decides who gets the odd one.

        Raises:
            InputError: a long text gives too few tokens; its number is named.
        """
        numbers = range(len(texts)) if numbers is None else numbers
        if pairs is None:
            return [self._one(text, number) for number, text in zip(numbers, texts, strict=True)], None
        both = [self._pair(*pair) for pair in zip(texts, pairs, numbers, strict=True)]
        return [text for text, _ in both], [pair for _, pair in both]

    def _pair(self, text: str, pair: str, number: int) -> tuple[str, str]:
        if len(text) <= self.short and len(pair) <= self.short:
            return text, pair
        first, second = self._one(text, number), self._one(pair, number)
        # Truncation compares the numbers of tokens: the longer text must stay the longer one.
        longer_first = len(text) > len(pair)
        size = self.short
        while (first, second) != (text, pair) and (self._tokens(first) > self._tokens(second)) != longer_first:
            size *= 2
            if longer_first and len(first) < len(text):
                first = self._one(text, number, size)
            elif not longer_first and len(second) < len(pair):
                second = self._one(pair, number, size)
            else:
                break
        return first, second

    def _one(self, text: str, number: int, least: int = 0) -> str:
        if len(text) <= max(self.short, least):
            return text
        found = self._left(text, least) if self.side == "left" else self._right(text, least)
        if found is None:
            raise InputError(
                f"text {number}: {len(text)} characters, of which the {self.most} that are looked at give fewer "
                f"than {self.max_length} tokens, or depend on what follows; shorten it"
            )
        return found

    def _right(self, text: str, least: int) -> str | None:
        """The beginning of a text; None where too much of it would be needed."""
        if not self.facts.is_local:
            return text if len(text) <= self.most else None
        size, tries = max(8 * self.max_length, LEAST, least), TRIES
        while True:
            size = min(size, self.most)
            piece = self.runs.shorten(text, size)
            if piece.used == len(text) and not piece.is_open:
                return piece.text
            if (found := self._at_word(piece.text)) is not None:
                return found
            if len(text) <= 4 * self.short:
                return text
            is_full = self._is_full(piece.text)
            if is_full and (found := self._anywhere(text, piece)) is not None:
                return found
            # More of the text rarely helps where there are tokens enough, and overflowing ones take memory.
            tries -= is_full
            if piece.is_open or size == self.most or not tries:
                return None
            size *= 2

    def _left(self, text: str, least: int) -> str | None:
        """The end of a text, from the end of a word on."""
        size = max(8 * self.max_length, LEAST, least)
        while self.facts.is_local and self.facts.parts_words and self.facts.has_plain_start and size <= self.most:
            start = len(text) - size
            if start <= 0:
                return text
            for place in self.places.finditer(text, start, start + SEARCHED):
                found = text[place.start() :]
                if not self._splits_added(text[place.start() - self.runs.tail :], self.runs.tail):
                    if self._is_full(found):
                        return found
                    break
            size *= 2
        return text if len(text) <= self.most else None

    def _at_word(self, piece: str) -> str | None:
        """The text up to the last word end near the end of `piece`, if that gives enough tokens."""
        if not self.facts.parts_words:
            return None
        # Behind the place an added token may go on.
        start, stop = max(0, len(piece) - SEARCHED), len(piece) - self.facts.longest_added
        places = [place.start() for place in self.places.finditer(piece, start, max(start, stop))]
        for place in reversed(places):
            if not self._splits_added(piece, place):
                return piece[:place] if self._is_full(piece[:place]) else None
        return None

    def _splits_added(self, text: str, place: int) -> bool:
        """Whether an added token with a blank inside lies across the place."""
        near = text[max(0, place - self.facts.longest_added) : place + self.facts.longest_added]
        return any(" " in token.content and _plain(token.content) in _plain(near) for token in self.facts.added)

    def _anywhere(self, text: str, start: Shortened) -> str | None:
        """The text up to a cut after which no token that is kept can change."""
        piece, width = start.text, self._width
        if len(piece) < 2 * width or self._is_swallowed(text, start):
            return None
        if self.facts.word_limit:
            return piece if self._ends_words_before(piece) else None
        if not self.facts.has_prefixes:
            return None
        # No more than is needed: it is read as many times as the window is wide.
        piece = piece[: self.tokenizer.encode(piece, add_special_tokens=False).offsets[-1][1] + 2 * width]
        # Normal forms sort marks, however many there are behind one letter.
        if self.facts.kinds & NORMAL_FORMS and all(unicodedata.combining(char) for char in piece[-MARKS:]):
            follows = text[start.used : start.used + 1]
            if not start.is_open or (follows and unicodedata.combining(follows)):
                return None
        if not self._is_full(piece[:-width]):
            return None
        expected = self._ids(piece)
        if any(self._ids(piece[:-back]) != expected for back in range(width, 0, -1)):
            return None
        return piece

    def _ends_words_before(self, piece: str) -> bool:
        """Whether the kept tokens belong to words that end well before the last two and the end."""
        encoding = self.tokenizer.encode(piece, add_special_tokens=False)
        words = [word for word in encoding.word_ids if word is not None]
        rest = [word for part in encoding.overflowing for word in part.word_ids if word is not None]
        if not words or not rest:
            return False
        return words[-1] + 2 < rest[-1] and encoding.offsets[-1][1] + self._width < len(piece)

    def _is_swallowed(self, text: str, start: Shortened) -> bool:
        """Whether an added token that takes the blanks before it stands behind the blanks at the end."""
        greedy = [token.content for token in self.facts.added if token.lstrip]
        if not greedy or not any(char.isspace() for char in start.text[-self._width :]):
            return False
        # What is not in the piece begins where its last blanks end in the text.
        end = row_end(text, start.used, r"\s") if start.text[-1].isspace() else start.used
        more, place = start.text + text[end : end + self._width], len(start.text) - self._width
        while (found := re.compile(r"\s+").search(more, place)) and found.start() <= len(start.text):
            if any(_plain(more[found.end() :]).startswith(_plain(content)) for content in greedy):
                return True
            place = found.end()
        return False

    @property
    def _width(self) -> int:
        """Characters of a window in which a token of the whole text ends, whatever the text."""
        return max(self.facts.longest, self.facts.longest_added) + self.facts.longest_added + MARKS

    def _is_full(self, text: str) -> bool:
        return bool(self.tokenizer.encode(text).overflowing)

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text).ids
        return found

    def _tokens(self, text: str) -> int:
        """How many there are, those behind the cut too."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return len(encoding.ids) + sum(len(part.ids) for part in encoding.overflowing)

    @cached_property
    def facts(self) -> TokenizerFacts:
        """Read when the first long text comes."""
        return TokenizerFacts(self.tokenizer)

    @cached_property
    def runs(self) -> LongRuns:
        """As `facts`."""
        return LongRuns(self.facts, self.max_length)

    @cached_property
    def places(self) -> re.Pattern[str]:
        """Ends of words."""
        return re.compile(SAFE_BERT if self.facts.is_bert else SAFE)


def _plain(text: str) -> str:
    return text.casefold()
