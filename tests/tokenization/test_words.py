"""Words and their first tokens, held against the count of words that the library tokenizers keeps itself."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qrlora_deploy.tokenization.words import NO_TOKEN, joined, locate, moved, shift_of, words_of
from tests.tiny import SENTENCES, build_word_pieces

BLANK = "\u0120"
LETTERS = st.text("abcxyzé", min_size=1, max_size=6)


def byte_level(trims: bool) -> Tokenizer:
    """A BPE of bytes, whose tokens begin with the blank before them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    made.post_processor = processors.ByteLevel(trim_offsets=trims)
    return made


TOKENIZERS = {
    "WordPiece": build_word_pieces(),
    "bytes": byte_level(trims=False),
    "bytes, trimmed": byte_level(trims=True),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(words=st.lists(LETTERS, min_size=1, max_size=8))
def test_the_first_token_of_a_word_is_that_of_the_library(kind: str, words: list[str]) -> None:
    text, places = joined(words)
    assert [text[start:end] for start, end in places] == words
    encoding = TOKENIZERS[kind].encode(text)
    # A blank that is a token of its own is counted to the word behind it; it says nothing of the word.
    known = [None if token == BLANK else word for token, word in zip(encoding.tokens, encoding.word_ids, strict=True)]
    expected = [known.index(number) for number in range(len(words))]
    assert list(locate(text, places, encoding.offsets).tokens) == expected


def test_what_has_no_token_or_shares_one() -> None:
    text = "ab cd ef"
    _, places = joined(text.split())
    # Special tokens are empty; one token reaches over two words; the last word was cut off.
    assert locate(text, places, [(0, 0), (0, 4), (4, 5), (0, 0)]).tokens == [1, NO_TOKEN, NO_TOKEN]
    assert locate(text, places, [(0, 0), (0, 1), (1, 2), (2, 5), (0, 0)]).tokens == [1, 3, NO_TOKEN]
    # Cut on the left.
    assert locate(text, places, [(0, 0), (5, 8), (0, 0)]).tokens == [NO_TOKEN, NO_TOKEN, 1]
    # Padded on the left.
    assert locate(text, places, [(0, 0)] * 3 + [(0, 2), (2, 5), (5, 8)]).tokens == [3, 4, 5]


def test_words_of_a_text() -> None:
    text = "Ada's flat, in Köln."
    assert [text[start:end] for start, end in words_of(text)] == ["Ada", "'", "s", "flat", ",", "in", "Köln", "."]
    assert [text[start:end] for start, end in words_of(text, [2, 17, 3])][:2] == ["Ad", "a"]
    assert words_of(" \n") == ()


def test_places_in_the_whole_text() -> None:
    assert shift_of("abcd", "ab") == 0 and shift_of("abcd", "cd") == 2 and shift_of("abcd", "abd") is None
    assert moved([(0, 0), (1, 2)], 3) == [(3, 3), (4, 5)] and moved([(1, 2)], 0) == [(1, 2)]
