"""What a model answers, and the outputs that it has for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A part of a text that a model found.

    Attributes:
        text: the part itself.
        label: what it is.
        start: its first character in the whole text.
        end: the character behind it.
        score: the mean probability of the tags of its words.
    """

    text: str
    label: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Answer:
    """What a model answers to one text.

    Attributes:
        label: the name of the most likely output; of a regression the name of its only one; of tagged words that of the
            surest span.
        score: its probability; of a regression the value itself.
        labels: the names of all outputs that apply: one of a classification, any number of a multi-label task, one for
            each word where words are tagged.
        spans: what was found in the text, where words are tagged.
    """

    label: str
    score: float
    labels: tuple[str, ...]
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class NewHead:
    """Outputs that are made for training data.

    Attributes:
        labels: their names, in the order of the logits.
        bias: where the bias of the output layer starts.
    """

    labels: tuple[str, ...]
    bias: float = 0.0
