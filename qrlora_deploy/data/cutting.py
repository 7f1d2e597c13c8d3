"""Long texts cut for transformers' tokenizers, as `tokens.text_cut` cuts them in serving."""

from collections.abc import Sequence
from typing import Any

from qrlora_deploy.errors import InputError
from qrlora_deploy.tokenization.text_cut import TextCutter


def cut_texts(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int, name: str = ""
) -> tuple[list[str], list[str] | None]:
    """The texts and pairs, those that are long as far as their first `max_length` tokens go.

    A tokenizer in Python gets them as they are.

    Args:
        tokenizer: of transformers; nobody else may use it meanwhile.
        max_length: tokens to which the tokenizer is going to truncate.
        name: of the data, for messages, in which rows are counted from 1.

    Raises:
        InputError: a text gives too few tokens for its length.
    """
    seconds = None if pairs is None else list(pairs)
    cutter = TextCutter(getattr(tokenizer, "backend_tokenizer", None), max_length, tokenizer.truncation_side)
    longest = max(map(len, (*texts, *(seconds or ()))), default=0)
    if longest <= cutter.short or not getattr(tokenizer, "is_fast", False):
        return list(texts), seconds
    # As transformers sets it up for every call.
    cutter.tokenizer.enable_truncation(max_length, direction=tokenizer.truncation_side)
    try:
        return cutter.cut(texts, seconds, range(1, len(texts) + 1))
    except InputError as error:
        raise InputError(f"{name}: {error}" if name else str(error)) from error
