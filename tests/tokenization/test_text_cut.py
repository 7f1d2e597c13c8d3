"""A text that is cut before it is tokenized gives the tokens of the whole text, whatever tokenizer and text."""

import string
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, processors, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre

from qrlora_deploy.errors import InputError
from qrlora_deploy.tokenization.text_cut import TextCutter

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<mask>"]
SIGN = "\u2581"
CORPUS = [
    "book a flight from boston to denver for tomorrow morning, don't we'll",
    "SELECT x, y; aaaa aaaaaaaa abab ababab 1234 56789",
    "e\u0301t\u00e9 na\u00efve \u4f60\u597d\u4e16\u754c",
    "    indented\n\n  text\t\tx",
] * 5
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def finish(tokenizer: Any) -> Any:
    """Added tokens of every kind, and the special ones around a text or pair."""
    tokenizer.add_special_tokens([*SPECIAL[:4], AddedToken("<mask>", lstrip=True)])
    tokenizer.add_tokens([AddedToken("<ticket>"), AddedToken("new york", normalized=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def word_piece(normalizer: Any, pre_tokenizer: Any, limit: int = 100) -> Any:
    signs = string.ascii_lowercase + "\u4f60\u00e9\u0301" + string.punctuation
    words = dict.fromkeys([*SPECIAL, *signs, *("##" + sign for sign in signs), "play", "music", "flight", "##ing"])
    vocabulary = {word: index for index, word in enumerate(words)}
    return made(
        models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=limit), normalizer, pre_tokenizer
    )


def made(model: Any, normalizer: Any, pre_tokenizer: Any, trainer: Any = None) -> Any:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if trainer is not None:
        tokenizer.train_from_iterator(CORPUS, trainer)
    return finish(tokenizer)


def bpe(normalizer: Any, pre_tokenizer: Any, **options: Any) -> Any:
    alphabet = [] if options else pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return made(models.BPE(**options), normalizer, pre_tokenizer, trainer)


def unigram(normalizer: Any, pre_tokenizer: Any) -> Any:
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    return made(models.Unigram(), normalizer, pre_tokenizer, trainer)


KINDS: dict[str, Callable[[], Any]] = {
    "bert": lambda: word_piece(norm.BertNormalizer(lowercase=True), pre.BertPreTokenizer()),
    "bert cased": lambda: word_piece(norm.BertNormalizer(lowercase=False, strip_accents=False), pre.BertPreTokenizer()),
    "words": lambda: word_piece(norm.Sequence([norm.NFKC(), norm.Lowercase(), norm.StripAccents()]), pre.Whitespace()),
    "short words": lambda: word_piece(norm.NFD(), pre.WhitespaceSplit(), 20),
    "gpt2": lambda: bpe(None, pre.ByteLevel(add_prefix_space=False)),
    "roberta": lambda: bpe(norm.NFC(), pre.ByteLevel(add_prefix_space=True)),
    "split": lambda: bpe(norm.NFC(), pre.Sequence([pre.Split(Regex(SPLIT), "isolated"), pre.ByteLevel(False, False)])),
    "metaspace": lambda: bpe(None, pre.Metaspace(), unk_token="[UNK]", fuse_unk=True),
    "no words": lambda: bpe(
        norm.Sequence([norm.Prepend(SIGN), norm.Replace(" ", SIGN)]), None, unk_token="[UNK]", fuse_unk=True
    ),
    "unigram": lambda: unigram(norm.Sequence([norm.NFKC(), norm.Replace(Regex(" {2,}"), " ")]), pre.Metaspace()),
    "unigram words": lambda: unigram(norm.NFKC(), pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()])),
}
tokenizer_of = cache(lambda kind: KINDS[kind]())

UNITS = (
    *(" ", "\n", " \n", "\t ", "\u2003", "a", "ab", "abc", "e\u0301", "\u0301", "\u0301\u0327", "\u4f60", "\U0001f600"),
    *("!", "?!", "1", "\u00e9", "<ticket>", "new york ", "<mask>", "'re", "\x00", "\u200b", "Z\u0301", "_", "x y "),
)
WORDS = ("play", "music", "flight", "new", "york", "don't", "zzz", "\u4f60\u597d", "caf\u00e9", "<ticket>", "a<mask>b")
rows = st.builds(
    lambda unit, size: (unit * size)[:size], st.sampled_from(UNITS), st.sampled_from((1, 2, 5, 90, 101, 130, 700, 4000))
)
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=200).map(" ".join)
noise = st.text(st.sampled_from("abcxyz \u0301\u0327e\n'!<>\u4f60\u00e9\U0001f600"), max_size=300)
texts = st.lists(st.one_of(rows, sentences, noise), min_size=1, max_size=6).map("".join)


class Recorder:
    """A tokenizer that remembers the longest text it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.most = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.most = max(self.most, len(text))
        return self.tokenizer.encode(text, **options)


def cutter_of(kind: str, max_length: int, short: int | None = None, side: str = "right") -> tuple[Any, TextCutter]:
    tokenizer = tokenizer_of(kind)
    tokenizer.enable_truncation(max_length, direction=side)
    cutter = TextCutter(Recorder(tokenizer), max_length, side)
    cutter.short = cutter.short if short is None else short
    return tokenizer, cutter


def check(kind: str, examples: int, side: str = "right") -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(text=texts, max_length=st.sampled_from((8, 16, 33)), short=st.sampled_from((50, 300, 1000)))
    def prove(text: str, max_length: int, short: int) -> None:
        tokenizer, cutter = cutter_of(kind, max_length, short, side)
        try:
            (found,), _ = cutter.cut([text])
        except InputError:
            return
        assert tokenizer.encode(found).ids == tokenizer.encode(text).ids

    prove()


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_the_whole_text(kind: str) -> None:
    check(kind, 25)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_very_many_texts(kind: str) -> None:
    check(kind, 500)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "unigram", "no words"])
def test_the_last_tokens_are_those_of_the_whole_text(kind: str) -> None:
    check(kind, 25, "left")


SIZE = 100_000
LONG = {
    "sentences": "play music " * (SIZE // 11),
    "blanks": " " * SIZE + "play",
    "several blanks": " \n\t" * (SIZE // 3),
    "one word": "play" * (SIZE // 4) + " music",
    "marks on a letter": "e" + "\u0301" * SIZE + " play",
    "letters with marks": "e\u0301" * (SIZE // 2) + " play",
    "ideographs": "\u4f60\u597d" * (SIZE // 2),
    "emoji": "\U0001f600" * SIZE,
    "digits": "1234567" * (SIZE // 7),
    "lines": ("q" * 70 + "\n") * (SIZE // 71),
    "words of all lengths": " ".join("a" * size for size in range(1, 900)),
}


@pytest.mark.parametrize("kind", ["bert", "bert cased", "gpt2", "no words", "unigram words"])
@pytest.mark.parametrize("name", LONG)
def test_a_long_text_is_never_read_as_a_whole(kind: str, name: str) -> None:
    tokenizer, cutter = cutter_of(kind, 32)
    text = LONG[name]
    (found,), _ = cutter.cut([text])
    assert cutter.tokenizer.most < 50_000
    assert tokenizer.encode(found).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", ["bert", "gpt2", "unigram"])
@pytest.mark.parametrize("sizes", [(120, 4), (4, 120), (120, 90), (90, 120), (60, 10)])
@pytest.mark.parametrize("max_length", [32, 33])
def test_both_texts_of_a_pair_lose_the_tokens_that_they_would_lose(
    kind: str, sizes: tuple[int, int], max_length: int
) -> None:
    # The library takes a time that grows with the product of both lengths, so these are short.
    tokenizer, cutter = cutter_of(kind, max_length, 300)
    first, second = "play music " * sizes[0], "flight " * (sizes[1] * 11 // 7)
    cut, pairs = cutter.cut([first], [second])
    assert pairs is not None
    found, expected = tokenizer.encode(cut[0], pairs[0]), tokenizer.encode(first, second)
    assert (found.ids, found.type_ids) == (expected.ids, expected.type_ids)


def test_a_text_whose_tokens_cannot_be_told_is_refused_by_its_number() -> None:
    """Unigram's best pieces of a word of one letter depend on how long it is."""
    _, cutter = cutter_of("unigram words", 32)
    with pytest.raises(InputError, match=r"text 7: 200000 characters.*shorten it"):
        cutter.cut(["play", "a" * (2 * SIZE)], None, [3, 7])


@pytest.mark.parametrize("part", ["dropout", "expression"])
def test_a_tokenizer_of_an_unknown_kind_reads_the_whole_text(part: str) -> None:
    tokenizer = bpe(None, pre.ByteLevel(add_prefix_space=False))
    if part == "dropout":
        tokenizer.model.dropout = 0.1
    else:
        tokenizer.pre_tokenizer = pre.Split(Regex(r"a(?=.*b)"), "isolated")
    tokenizer.enable_truncation(16)
    cutter = TextCutter(tokenizer, 16)
    text = "play music " * 5000
    assert cutter.cut([text]) == ([text], None)
    with pytest.raises(InputError, match="text 0"):
        cutter.cut([text * 4])
