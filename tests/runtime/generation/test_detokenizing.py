"""Streaming gives the text of all tokens, in whole characters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_deploy.runtime.generation.detokenizing import StreamingDecoder
from tests.runtime.generation.tokenizers_of_kinds import KINDS, TEXTS, byte_fallback, byte_level

HELD = 3
"""A character has four bytes at most, so three tokens at most wait for the next one."""


def streamed(tokenizer: object, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    decoder = StreamingDecoder(tokenizer, prompt or [])
    return [*(decoder.feed(token) for token in tokens), decoder.end()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=40) | st.sampled_from(TEXTS))
def test_the_pieces_of_a_text_are_the_text(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    tokens = tokenizer.encode(text).ids
    pieces = streamed(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    if kind == "byte_level":
        assert "".join(pieces) == text


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, byte_level().get_vocab_size() - 1), max_size=60))
def test_any_tokens_of_bytes_give_what_they_give_together(tokens: list[int]) -> None:
    assert "".join(streamed(byte_level(), tokens)) == byte_level().decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(prompt=st.sampled_from(TEXTS), words=st.sampled_from(TEXTS[:2]), start=st.integers(0, 10))
def test_an_answer_goes_on_where_the_prompt_ended(kind: str, prompt: str, words: str, start: int) -> None:
    """The first word keeps the space that a decoder strips from the beginning of a text."""
    tokenizer = KINDS[kind]()
    before, tokens = tokenizer.encode(prompt).ids, tokenizer.encode(words).ids[start:]
    together = tokenizer.decode(before + tokens)
    assert "".join(streamed(tokenizer, tokens, before)) == together[len(tokenizer.decode(before)) :]


def test_characters_come_whole_and_at_once() -> None:
    tokens = byte_level().encode("a🎉€b").ids
    pieces = streamed(byte_level(), tokens)
    assert all("\ufffd" not in piece for piece in pieces)
    decoder, waiting = StreamingDecoder(byte_level()), 0
    for token in tokens:
        waiting = 0 if decoder.feed(token) else waiting + 1
        assert waiting <= HELD
    fallback = byte_fallback()
    assert [piece for piece in streamed(fallback, fallback.encode("quick 東京").ids) if piece][-2:] == ["東", "京"]


def test_broken_bytes_are_shown_in_the_end() -> None:
    first_byte = byte_level().encode("€").ids[0]
    assert streamed(byte_level(), [first_byte]) == ["", "\ufffd"]


def test_endless_broken_bytes_are_not_held_for_ever() -> None:
    first_byte = byte_level().encode("€").ids[0]
    pieces = streamed(byte_level(), [first_byte] * 100)
    assert "".join(pieces[:50]) and "".join(pieces) == "\ufffd" * 100


def test_special_tokens_give_no_text() -> None:
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<|im_end|>")
    tokens = [*tokenizer.encode("the fox").ids, end, *tokenizer.encode(" jumps").ids]
    assert "".join(streamed(tokenizer, tokens)) == "the fox jumps"
