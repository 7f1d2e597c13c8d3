"""What a model is trained on: token ids of examples with their targets."""

from collections.abc import Callable, Sequence
from typing import Any

from qrlora_deploy.data.cutting import cut_texts, encode_words
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.tasks.base import Task

Row = dict[str, Any]
Rows = list[Row]

FIRST, SECOND = "first", "second"
"""The texts of a pair in a row, where each is read by itself."""


def build_rows(
    tokenizer: Any, examples: Examples, targets: Sequence[Any], max_length: int, task: Task | None = None
) -> Rows:
    """Token ids of every example with its target; padding is left to the batch.

    Args:
        tokenizer: of the base.
        examples: the rows.
        targets: of the rows, from `Task.encode`.
        max_length: tokens of a row.
        task: says whether the texts of a pair are read each by itself, and places targets at the tokens of tagged
            words; needed for these alone.

    Raises:
        InputError: a text gives too few tokens for its length, or words are tagged and the tokenizer cannot say
            where its tokens are.
    """
    if task is not None and task.answers_words:
        return _tagged_rows(tokenizer, examples, targets, max_length, task)
    if task is not None and task.pairs_apart:
        firsts, seconds = (
            _token_rows(tokenizer, texts, None, max_length, examples.name)
            for texts in (examples.texts, examples.pairs or examples.texts)
        )
        rows = [{FIRST: first, SECOND: second} for first, second in zip(firsts, seconds, strict=True)]
    else:
        rows = _token_rows(tokenizer, examples.texts, examples.pairs, max_length, examples.name)
    return [row | {"labels": target} for row, target in zip(rows, targets, strict=True)]


def _token_rows(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int, name: str) -> Rows:
    first, second = cut_texts(tokenizer, texts, pairs, max_length, name)
    encoded = tokenizer(first, second, truncation=True, max_length=max_length)
    names = list(encoded)
    return [{name: encoded[name][row] for name in names} for row in range(len(texts))]


def _tagged_rows(tokenizer: Any, examples: Examples, targets: Sequence[Any], max_length: int, task: Task) -> Rows:
    encoded, located = encode_words(tokenizer, examples, max_length)
    names = list(encoded)
    return [
        {name: encoded[name][row] for name in names}
        | {"labels": task.place_target(target, words, len(encoded["input_ids"][row]))}
        for row, (target, words) in enumerate(zip(targets, located, strict=True))
    ]


def texts_of(row: Row) -> list[Row]:
    """What a model reads of a row: one text, or the two of a pair."""
    return [row[FIRST], row[SECOND]] if FIRST in row else [row]


def collate_pairs(pad: Callable[[list[Row]], Any]) -> Callable[[list[Row]], dict[str, Any]]:
    """A batch `[2 n, length]` of n pairs, all first texts and then all second ones, with labels `[n]`.

    Args:
        pad: makes a batch of token ids of some texts.
    """

    def collate(rows: list[Row]) -> dict[str, Any]:
        import torch

        texts = [row[part] for part in (FIRST, SECOND) for row in rows]
        return {**pad(texts), "labels": torch.tensor([row["labels"] for row in rows])}

    return collate
