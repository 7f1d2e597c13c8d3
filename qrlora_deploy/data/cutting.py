"""Long texts cut for transformers' tokenizers, as `tokens.text_cut` cuts them in serving."""

from collections.abc import Sequence
from typing import Any

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.tokenization.text_cut import TextCutter
from qrlora_deploy.tokenization.words import LocatedWords, locate, moved, shift_of


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


def encode_words(tokenizer: Any, examples: Examples, max_length: int) -> tuple[Any, list[LocatedWords]]:
    """The tokens of texts whose words have tags, without padding, and the words by these tokens.

    Args:
        tokenizer: a fast one of transformers; nobody else may use it meanwhile.
        examples: rows with `words`.
        max_length: tokens to which rows are truncated.

    Returns:
        The tokenizer's lists by name, and the words of each row.

    Raises:
        InputError: the tokenizer is a slow one, or a text gives too few tokens for its length.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("tags of words need a fast tokenizer (tokenizer.json), which says where its tokens are")
    texts, _ = cut_texts(tokenizer, examples.texts, None, max_length, examples.name)
    shifts = [shift_of(text, cut) for text, cut in zip(examples.texts, texts, strict=True)]
    # A text out of whose middle something was taken has its tokens elsewhere; it is read whole.
    whole = [text if shift is None else cut for text, cut, shift in zip(examples.texts, texts, shifts, strict=True)]
    encoded = tokenizer(whole, truncation=True, max_length=max_length, return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")
    located = [
        locate(text, places, moved(own, shift or 0))
        for text, places, own, shift in zip(examples.texts, examples.words or (), offsets, shifts, strict=True)
    ]
    return encoded, located
