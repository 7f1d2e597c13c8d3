"""Words of a text, and which token of it speaks for each: tags belong to words, and tokenizers know parts of them."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

Place = tuple[int, int]
"""Where something begins in a text and where it ends, in characters."""

JOINING = ("Mn", "Mc", "Me", "Cf")
"""Categories of characters that belong to the one before: accents, vowel signs, joiners, soft hyphens."""

PLANES = (range(0x20000), range(0xE0000, 0xE1000))
"""Where such characters are: the planes between hold ideographs or nothing."""

NO_TOKEN = -1


@dataclass(frozen=True)
class LocatedWords:
    """The words of a text by its tokens.

    Attributes:
        text: the whole text.
        places: of its words, rising.
        tokens: the number of the first token of each word; `NO_TOKEN` where it was cut off or has none.
    """

    text: str
    places: Sequence[Place]
    tokens: Sequence[int]


@cache
def _word() -> re.Pattern[str]:
    """A run of letters and digits, or one other character, each with what joins it.

    Data that come as words need not follow it. What joins is no word by itself: tokenizers drop much of it, and a
    word without a token would part the entity around it.
    """
    characters = map(chr, chain(*PLANES))
    joining = "".join(character for character in characters if unicodedata.category(character) in JOINING)
    return re.compile(rf"\w[\w{joining}]*|[^\w\s{joining}][{joining}]*")


def words_of(text: str, borders: Sequence[int] = ()) -> tuple[Place, ...]:
    """The places of the words of a text.

    Args:
        text: any text.
        borders: where a word is parted, too, in characters.
    """
    cuts = set(borders)
    found: list[Place] = []
    for match in _word().finditer(text):
        start = match.start()
        for end in (*(place for place in range(start + 1, match.end()) if place in cuts), match.end()):
            found.append((start, end))
            start = end
    return tuple(found)


def joined(words: Sequence[str]) -> tuple[str, tuple[Place, ...]]:
    """Words as one text with a blank between them, and their places in it."""
    places, start = [], 0
    for word in words:
        places.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), tuple(places)


def locate(text: str, places: Sequence[Place], offsets: Sequence[Place]) -> LocatedWords:
    """Find the first token of each word.

    Args:
        text: the whole text.
        places: of its words, rising.
        offsets: of its tokens, in the text; empty ones, as special tokens and padding have, are nobody's.
    """
    first: list[int] = []
    used, token = NO_TOKEN, 0
    for start, end in places:
        while token < len(offsets) and not _ends_behind(text, offsets[token], start):
            token += 1
        begins = token < len(offsets) and _begin(text, offsets[token]) < end
        # A token that reaches over two words speaks for the first of them.
        first.append(token if begins and token != used else NO_TOKEN)
        used = token if begins else used
    return LocatedWords(text, places, first)


def shift_of(text: str, cut: str) -> int | None:
    """By how many characters the places of a cut text are before those of the whole one; None where it is no part."""
    if text.startswith(cut):
        return 0
    return len(text) - len(cut) if text.endswith(cut) else None


def moved(offsets: Sequence[Place], shift: int) -> Sequence[Place]:
    """Places of tokens further on in a text; empty ones stay empty."""
    return [(start + shift, end + shift) for start, end in offsets] if shift else offsets


def _begin(text: str, offset: Place) -> int:
    """Where a token begins without the blanks that some tokenizers count to it."""
    start, end = offset
    while start < end and text[start].isspace():
        start += 1
    return start


def _ends_behind(text: str, offset: Place, start: int) -> bool:
    return offset[1] > start and _begin(text, offset) < offset[1]
