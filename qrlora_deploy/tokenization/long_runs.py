"""Long rows of characters of which only the beginning can show in the first tokens, made shorter.

Blanks, one character again and again, and words longer than any that the model knows are where a few
tokens take a whole text. What is taken out of the middle of such a row changes none of the first tokens:
it gives no token, or all of it is one. A row of one character that gives more of them ends what is looked
at, since its tokens may depend on its length.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from qrlora_deploy.tokenization.tokenizer_facts import TokenizerFacts

BLANKS = " \t\n\r"
"""Those that every tokenizer treats alike; others are rows only where they repeat."""

ALL_BLANKS = BLANKS + "\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Those that end a word and are nothing else, where no normalizer takes some of them out."""

TAIL = 64
"""Characters that stay at the end of a row: an added token may begin in it."""

FEW_BLANKS = 16
BLOCK = 65536
FEW_TOKENS = 3
"""Of a row that is far longer than as many of the longest tokens: they come from its ends."""

IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f"
"""The characters that BERT makes words of their own."""

PLAIN_NORMALIZERS = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"}
"""They make letters of letters."""

SURE_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff"
"""Those that it has known in every version."""

WORD_PRE_TOKENIZERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation"}


class Shortened(NamedTuple):
    """The beginning of a text.

    Attributes:
        text: with what rows may lose taken out.
        used: how much of the original it stands for.
        is_open: it ends in a row whose tokens may depend on the rest of the row.
    """

    text: str
    used: int
    is_open: bool


class LongRuns:
    """Finds such rows for one tokenizer.

    Args:
        facts: of the tokenizer.
        max_length: tokens that are wanted.

    Attributes:
        margin: characters that a row may have and still be whole.
    """

    def __init__(self, facts: TokenizerFacts, max_length: int) -> None:
        self.facts, self.limit = facts, facts.word_limit
        self.tail = max(TAIL, facts.longest_added)
        self.word_wise = word_wise = bool(facts.word_limit) and facts.drops_blanks
        repeated = max((len(token.content) for token in facts.added if len(set(token.content)) == 1), default=1)
        # Of as many characters come that many tokens, if they come to any number that grows with the row.
        wide = (max_length + 2) * max(facts.longest, facts.longest_added) * (2 if facts.normalizers else 1)
        self.head = max(2 * facts.word_limit, (max_length + 2) * repeated, self.tail) if word_wise else wide
        self.blanks = FEW_BLANKS if facts.drops_blanks else wide
        self.blank = ALL_BLANKS if facts.drops_blanks and not facts.kinds & {"Precompiled", "Nmt"} else BLANKS
        self.word = _word_characters(facts) if word_wise else None
        self.margin = max(self.blanks, self.head) + self.tail + 1
        patterns = [
            rf"(?P<blanks>[{self.blank}]{{{self.blanks + self.tail + 1}}})",
            rf"(?P<same>(?s:(?P<first>.)(?P=first){{{self.head + self.tail}}}))",
        ]
        if self.word:
            patterns.append(rf"(?P<word>[{''.join(self.word)}]{{{self.head + self.tail + 1}}})")
        self.pattern = re.compile("|".join(patterns))

    def shorten(self, text: str, size: int) -> Shortened:
        """The first `size` characters or some more; fewer where a row ends what can be looked at."""
        kept: list[str] = []
        count = position = 0
        while position < len(text) and count < size:
            stop = min(len(text), position + size - count)
            # A row that begins before the stop may go beyond it.
            found = self.pattern.search(text, position, min(len(text), stop + self.margin))
            if found is None or found.start() >= stop:
                piece, position, is_open = text[position:stop], stop, False
            else:
                row, end, is_open = self._row(text, found)
                piece, position = text[position : found.start()] + row, end
            kept.append(piece)
            count += len(piece)
            if is_open:
                return Shortened("".join(kept), position, True)
        return Shortened("".join(kept), position, False)

    def _row(self, text: str, found: re.Match[str]) -> tuple[str, int, bool]:
        """What stays of a row, where it ends, and whether its tokens may depend on its length."""
        start = found.start()
        blank = found["blanks"] is not None
        if not blank and found["same"] is None:
            return *self._word_row(text, start), False
        end = row_end(text, start, f"[{self.blank}]" if blank else re.escape(text[start]))
        head = text[start : start + (self.blanks if blank else self.head)]
        if not self.word_wise and self._tokens(head) > FEW_TOKENS:
            return head, end, True
        return head + text[end - self.tail : end], end, False

    def _tokens(self, text: str) -> int:
        return len(self.facts.tokenizer.encode(text, add_special_tokens=False).ids)

    def _word_row(self, text: str, start: int) -> tuple[str, int]:
        """As `_row`: the word up to more letters than any known word has, and as many marks between two of them."""
        assert self.word is not None
        letters, marks = (re.compile(f"[{part}]+") if part else None for part in self.word)
        kept, count, position = "", 0, start
        while count <= self.limit or len(kept) < self.head:
            if some := letters.match(text, position, position + self.head) if letters else None:
                kept += some[0]
                count += len(some[0])
                position = some.end()
            elif some := marks.match(text, position) if marks else None:
                kept += text[position : min(some.end(), position + self.head)]
                position = some.end()
            else:
                return kept, position
        end = row_end(text, position, f"[{''.join(self.word)}]")
        return kept + text[max(position, end - self.tail) : end], end


def row_end(text: str, start: int, pattern: str) -> int:
    """Where the row of characters of `pattern` that begins at `start` ends."""
    more = re.compile(f"{pattern}*")
    first = re.escape(text[start]) if start < len(text) else ""
    same = text[start : start + 1] * BLOCK
    position = start
    while position < len(text):
        block = text[position : position + BLOCK]
        # Comparing is much faster than matching.
        plain = pattern != first and block.isascii() and block.isalnum()
        if not plain and block != same[: len(block)]:
            found = more.match(block)
            taken = found.end() if found else 0
            if taken < len(block):
                return position + taken
        position += len(block)
    return len(text)


def _word_characters(facts: TokenizerFacts) -> tuple[str, str] | None:
    """Letters and marks that end no word, as insides of character classes; None where that is not known."""
    if not {part.get("type") for part in facts.pre_tokenizers} <= WORD_PRE_TOKENIZERS:
        return None
    if not facts.kinds <= PLAIN_NORMALIZERS:
        found = ("A-Za-z0-9", "")
    else:
        # A mark may change the letter before many others that are then taken out.
        words = letters() if "BertNormalizer" in facts.kinds else letters() + SURE_IDEOGRAPHS
        found = (words, "" if "StripAccents" in facts.kinds and facts.kinds & {"NFC", "NFKC"} else marks())
    inside = re.compile(f"[{''.join(found)}]+")
    return None if any(inside.fullmatch(token.content) for token in facts.added) else found


@cache
def letters() -> str:
    """Letters and digits that stay such in every normal form; without ideographs, which may be words of their own."""
    ideograph = re.compile(f"[{IDEOGRAPHS}]")

    def wanted(char: str, kind: str) -> bool:
        parts = unicodedata.normalize("NFKD", char)
        plain = all(part.isalnum() or unicodedata.category(part) == "Mn" for part in parts)
        return (kind[0] == "L" or kind == "Nd") and plain and not ideograph.match(char)

    return _characters(wanted)


@cache
def marks() -> str:
    """Combining marks without width."""
    return _characters(lambda _char, kind: kind == "Mn")


def _characters(wanted: Callable[[str, str], bool]) -> str:
    """The spans of wanted characters that Unicode 3.2 knew and that have not changed their kind since."""
    spans: list[list[int]] = []
    for code in range(0x10000):
        char = chr(code)
        kind = unicodedata.ucd_3_2_0.category(char)
        if unicodedata.category(char) == kind and wanted(char, kind):
            if spans and spans[-1][1] == code - 1:
                spans[-1][1] = code
            else:
                spans.append([code, code])
    return "".join(f"\\u{low:04x}-\\u{high:04x}" for low, high in spans)
