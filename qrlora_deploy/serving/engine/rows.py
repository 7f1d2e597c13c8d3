"""What goes through an engine: the size of a request, its rows, and their answers. Nobody changes them once they are
made; they are not frozen, since every request makes some, and frozen ones take three times as long to make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.tasks.answering import Answering
from qrlora_deploy.tokenization.words import LocatedWords


@dataclass(slots=True)
class Load:
    """How much a request takes of an engine.

    Attributes:
        rows: texts.
        tokens: of all rows, without padding; before the texts are tokenised the most that they can be.
        size_bytes: of the texts.
        asker: whose request it is, such as the id of a key; those who ask take turns where customers are fetched.
    """

    rows: int
    tokens: int
    size_bytes: int
    asker: str = ""

    @classmethod
    def of_texts(cls, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int, asker: str = "") -> "Load":
        """The most that texts can take, without tokenising them: no tokenizer makes more tokens than bytes, but for
        the few special ones, and none more than `max_length`."""
        sizes = [len(text.encode("utf-8", "surrogatepass")) for text in texts]
        for row, pair in enumerate(pairs or ()):
            sizes[row] += len(pair.encode("utf-8", "surrogatepass"))
        return cls(len(sizes), sum(min(size + SPECIAL_TOKENS, max_length) for size in sizes), sum(sizes), asker)


SPECIAL_TOKENS = 4
"""Tokens that a tokenizer may put around a text or a pair."""


@dataclass(slots=True)
class Row:
    """A text, tokenised, and whose it is.

    Attributes:
        inputs: the graph's text inputs by name, int64 `[length]` each, without padding.
        customer: whose row it is; None: the base's.
        words: of the text, where each has an answer; they come back with it.
    """

    inputs: Mapping[str, np.ndarray]
    customer: str | None
    words: LocatedWords | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a batch, for those who look at where the time went.

    Attributes:
        start_s: a time of `time.monotonic`, which all processes of a machine share.
        end_s: another one.
        rows: of the batch.
        padded_tokens: rows x padded length.
    """

    start_s: float
    end_s: float
    rows: int
    padded_tokens: int


@dataclass(slots=True)
class RowAnswer:
    """What the model gave for a row.

    Attributes:
        logits: fp32, `[labels of the customer]`, or `[tokens, labels]` where each token of the row has an answer; where
            the answer is an embedding, that: `[width]`.
        labels: names of the customer's outputs; none of an embedding.
        digest: of the content of the customer that answered, as `Coefficients.digest`; empty for the base.
        thresholds: as of `Answering`.
        words: of the row.
        run: in which it was answered; None: nobody says.
    """

    logits: np.ndarray
    labels: tuple[str, ...]
    digest: str
    thresholds: tuple[float, ...] = ()
    words: LocatedWords | None = None
    run: Run | None = None

    @property
    def answering(self) -> Answering:
        """How the logits become an answer."""
        return Answering(self.labels, self.thresholds)
