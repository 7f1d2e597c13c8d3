"""A tag for each word of a text: names of people and places, parts of speech."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qrlora_deploy.data.labels import quoted
from qrlora_deploy.data.lines import row_of
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.base import IGNORED, Answer, NewHead, Span, Task
from qrlora_deploy.tasks.entities import OUTSIDE, entities, f1_of
from qrlora_deploy.tasks.names import label_index, label_names, output_of
from qrlora_deploy.tokenization.words import NO_TOKEN, LocatedWords

if TYPE_CHECKING:
    import torch

    from qrlora_deploy.data.examples import Examples


class TokenClassification(Task):
    """Every word has one tag; its first token answers for it."""

    name = "token-classification"
    option = "token-classification"
    problem_type = None
    model_class = "AutoModelForTokenClassification"
    output_shape = ("batch", "sequence", "labels")
    pipeline = "token-classification"
    peft_type = "TOKEN_CLS"
    metrics = ("f1", "accuracy")
    signal = "f1"
    trains_in_fleets = False

    def recognise(self, examples: "Examples") -> str | None:
        """The words of the rows have tags, as `Task.recognise`."""
        return None if examples.words is None else ""

    def new_head(self, examples: "Examples") -> NewHead:
        """One output a tag, `O` first, as `Task.new_head`."""
        self.check_rows(examples)
        names = label_names(self.named(examples))
        if len(names) < 2:
            raise InputError(f"{examples.name}: every word has the tag {names[0]}; there is nothing to tell apart")
        return NewHead(tuple(sorted(names, key=lambda name: name != OUTSIDE)))

    def encode(self, examples: "Examples", names: Sequence[str]) -> list[list[int]]:
        """The number of the output that each word's tag means, as `Task.encode`."""
        self.check_rows(examples)
        unknown = self.unknown(examples, names)
        if unknown:
            row = next(row for row, tags in enumerate(examples.labels) if not set(unknown).isdisjoint(tags))
            raise InputError(
                f"{row_of(examples.name, row + 1)} has unknown tags; of all rows "
                f"{quoted(unknown)}; the head knows {quoted(names)}"
            )
        index = label_index(names)
        found = {name: output_of(index, name) for name in set(self.named(examples))}
        return [[number for tag in tags if (number := found[tag]) is not None] for tags in examples.labels]

    def place_target(self, target: Any, words: LocatedWords, tokens: int) -> list[int]:
        """The number of its output for the first token of each word, `IGNORED` for all others."""
        placed = [IGNORED] * tokens
        for number, token in zip(target, words.tokens, strict=True):
            if token != NO_TOKEN:
                placed[token] = number
        return placed

    def loss(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The mean cross entropy over the tokens that have a target, targets `[n, tokens]` int64; 0 without any."""
        from torch.nn import functional

        total = functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total / (targets != IGNORED).sum().clamp(min=1)

    def score(self, logits: np.ndarray, targets: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
        """Micro F1 over entities, as `entities` finds them, and the share of words with the right tag."""
        present = np.asarray(targets) != IGNORED
        chosen = np.asarray(logits).argmax(axis=-1)
        right = chosen[present] == np.asarray(targets)[present]
        found, expected = (
            [[names[number] for number in row[own]] for row, own in zip(each, present, strict=True)]
            for each in (chosen, np.asarray(targets))
        )
        return {"f1": f1_of(found, expected), "accuracy": float(right.mean()) if right.size else 0.0}

    def answer(self, logits: np.ndarray, names: Sequence[str], words: LocatedWords | None = None) -> Answer:
        """The tag of each word and the entities that follow from them; a word without a token is outside of all."""
        if words is None:
            raise ValueError("the words of the text are needed to tag them")
        outside = names.index(OUTSIDE) if OUTSIDE in names else 0
        odds = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        shares = odds / odds.sum(axis=-1, keepdims=True)
        chosen = [outside if token == NO_TOKEN else int(logits[token].argmax()) for token in words.tokens]
        sure = [1.0 if token == NO_TOKEN else float(shares[token].max()) for token in words.tokens]
        tags = tuple(names[number] for number in chosen)
        spans = tuple(_span(words, sure, entity.start, entity.end, entity.kind) for entity in entities(tags))
        surest = max(spans, key=lambda span: span.score, default=None)
        if surest is None:
            return Answer(names[outside], min(sure, default=1.0), tags)
        return Answer(surest.label, surest.score, tags, spans)

    def matches(self, found: Sequence[str], expected: Sequence[str], names: Sequence[str]) -> bool:
        """Whether every word has its tag."""
        index = label_index(names)
        return [output_of(index, tag) for tag in found] == [output_of(index, tag) for tag in expected]

    def agreement(self, logits: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The share of tokens with the same tag, of those that are no padding."""
        present = np.isfinite(others).any(axis=-1)
        equal = (logits.argmax(axis=-1) == others.argmax(axis=-1)) & present
        found: np.ndarray = equal.sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)
        return found

    def right(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Whether every word of the row has its tag."""
        found: np.ndarray = ((logits.argmax(axis=-1) == targets) | (targets == IGNORED)).all(axis=-1)
        return found


def _span(words: LocatedWords, sure: Sequence[float], first: int, last: int, kind: str) -> Span:
    start, end = words.places[first][0], words.places[last - 1][1]
    return Span(words.text[start:end], kind, start, end, float(np.mean(sure[first:last])))
