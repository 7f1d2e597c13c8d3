"""What a model is trained on: token ids of examples with their targets."""

from collections.abc import Sequence
from typing import Any

from qrlora_deploy.data.cutting import cut_texts, encode_words
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.tasks.base import Task

Rows = list[dict[str, Any]]


def build_rows(
    tokenizer: Any, examples: Examples, targets: Sequence[Any], max_length: int, task: Task | None = None
) -> Rows:
    """Token ids of every example with its target; padding is left to the batch.

    Args:
        tokenizer: of the base.
        examples: the rows.
        targets: of the rows, from `Task.encode`.
        max_length: tokens of a row.
        task: places targets at the tokens of tagged words; needed for these alone.

    Raises:
        InputError: a text gives too few tokens for its length, or words are tagged and the tokenizer cannot say
            where its tokens are.
    """
    if task is not None and task.answers_words:
        return _tagged_rows(tokenizer, examples, targets, max_length, task)
    texts, pairs = cut_texts(tokenizer, examples.texts, examples.pairs, max_length, examples.name)
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    names = list(encoded)
    return [{name: encoded[name][row] for name in names} | {"labels": target} for row, target in enumerate(targets)]


def _tagged_rows(tokenizer: Any, examples: Examples, targets: Sequence[Any], max_length: int, task: Task) -> Rows:
    encoded, located = encode_words(tokenizer, examples, max_length)
    names = list(encoded)
    return [
        {name: encoded[name][row] for name in names}
        | {"labels": task.place_target(target, words, len(encoded["input_ids"][row]))}
        for row, (target, words) in enumerate(zip(targets, located, strict=True))
    ]
