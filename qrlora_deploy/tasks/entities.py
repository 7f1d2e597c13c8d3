"""What a sequence of tags says: the entities in it, by the rules of CoNLL's evaluation (IOB2, IOB1 and BIOES)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OUTSIDE = "O"
"""The tag of a word that belongs to no entity."""

BEGIN, INSIDE, END, SINGLE = "BIES"
PREFIXES = {BEGIN: BEGIN, INSIDE: INSIDE, END: END, "L": END, SINGLE: SINGLE, "U": SINGLE}


@dataclass(frozen=True, order=True)
class Entity:
    """Neighbouring words that belong together.

    Attributes:
        start: number of its first word.
        end: number behind its last word.
        kind: such as "PER"; of tags without a prefix, as parts of speech are, the tag itself.
    """

    start: int
    end: int
    kind: str


def parted(tag: str) -> tuple[str, str]:
    """Prefix and kind of a tag: ("B", "PER") of "B-PER"; a tag without a prefix stands for one word alone."""
    prefix, dash, kind = tag.partition("-")
    if dash and kind and prefix in PREFIXES:
        return PREFIXES[prefix], kind
    return SINGLE, tag


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities of one text, in their order.

    `I-X` behind `O`, or behind another kind than X, begins an entity too, as in seqeval's default mode: that a model
    forgot a `B` is no reason to lose what it found.
    """
    start, kind, over = 0, "", True
    for number, tag in enumerate((*tags, OUTSIDE)):
        prefix, found = ("", "") if tag == OUTSIDE else parted(tag)
        goes_on = prefix in (INSIDE, END) and found == kind and not over
        if kind and not goes_on:
            yield Entity(start, number, kind)
        if not goes_on:
            start, kind = number, found
        over = prefix in (END, SINGLE, "")


def f1_of(found: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> float:
    """Micro F1 over the entities of all texts: right where kind, start and end are. 0 where there are none at all."""
    right = answered = wanted = 0
    for one, other in zip(found, expected, strict=True):
        mine, theirs = set(entities(one)), set(entities(other))
        right, answered, wanted = right + len(mine & theirs), answered + len(mine), wanted + len(theirs)
    return 2 * right / (answered + wanted) if answered + wanted else 0.0
