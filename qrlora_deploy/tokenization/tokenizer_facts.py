"""What a tokenizer's parts promise about a text that is cut: how far what follows can reach back."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers

LOCAL_NORMALIZERS = {
    *("BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled"),
    *("ByteLevel", "Replace", "Strip", "Prepend"),
}
"""They change a character by its neighbours alone; the last two look at the ends of a text."""

LOCAL_REPLACEMENTS = {" {2,}", r"\s+", r"\s{2,}", r"\n", r"\t"}
"""Regular expressions of `Replace` that are known; plain strings all are."""

LOCAL_PRE_TOKENIZERS = {
    *("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "Metaspace", "ByteLevel"),
    *("CharDelimiterSplit", "UnicodeScripts", "Split"),
}
FAR_SIGHT = re.compile(r"\\[1-9]|\(\?(?!:|i:|!\\S\))|\\[zZAbBGK]|\$|\^(?<!\[\^)")
"""In the expression of a `Split`: what may look further than the next character."""

DROPS_BLANKS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
BLANK_SIGN = "\u2581"
PROBE = "ab cd 12 ef"


@dataclass(frozen=True)
class TokenizerFacts:
    """Read once for a tokenizer; what takes long is read when it is first asked for."""

    tokenizer: Any

    @cached_property
    def normalizers(self) -> list[dict[str, Any]]:
        """The parts of the normalizer, in order."""
        return _parts(self.tokenizer.normalizer, "normalizers")

    @cached_property
    def kinds(self) -> set[str]:
        """Of the normalizer's parts."""
        return {str(part.get("type")) for part in self.normalizers}

    @cached_property
    def pre_tokenizers(self) -> list[dict[str, Any]]:
        """The parts of the pre-tokenizer, in order."""
        return _parts(self.tokenizer.pre_tokenizer, "pretokenizers")

    @cached_property
    def model(self) -> str:
        """ "BPE", "Unigram", "WordPiece" or "WordLevel"."""
        return type(self.tokenizer.model).__name__

    @cached_property
    def added(self) -> list[tokenizers.AddedToken]:
        """Tokens that are found in the text before anything else."""
        return list(self.tokenizer.get_added_tokens_decoder().values())

    @cached_property
    def longest_added(self) -> int:
        """Characters of the longest added token."""
        return max((len(token.content) for token in self.added), default=0)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token; no token is made of more of the text."""
        return max(map(len, self._vocabulary()), default=1)

    @cached_property
    def joins_words(self) -> bool:
        """Whether a token goes on behind a word's end, by SentencePiece's sign for a blank."""
        return any(re.search(rf"[0-9A-Za-z]{BLANK_SIGN}", token) for token in self._vocabulary())

    def _vocabulary(self) -> Iterator[str]:
        # One by one: a dictionary of all takes megabytes.
        for index in range(self.tokenizer.get_vocab_size(with_added_tokens=True)):
            yield self.tokenizer.id_to_token(index) or ""

    @cached_property
    def is_local(self) -> bool:
        """Whether every part is known to look at the text nearby alone."""
        known = (
            self.kinds <= LOCAL_NORMALIZERS
            and {part.get("type") for part in self.pre_tokenizers} <= LOCAL_PRE_TOKENIZERS
        )
        patterns = [_expression(part) for part in self.normalizers if part.get("type") == "Replace"]
        splits = [_expression(part) for part in self.pre_tokenizers if part.get("type") == "Split"]
        near = all(pattern is None or pattern in LOCAL_REPLACEMENTS for pattern in patterns)
        near = near and not any(pattern is not None and FAR_SIGHT.search(pattern) for pattern in splits)
        return known and near and not getattr(self.tokenizer.model, "dropout", None)

    @cached_property
    def is_bert(self) -> bool:
        """Whether words are BERT's: blanks and punctuation end them, each ideograph is one."""
        normalizers = [part.get("type") for part in self.normalizers]
        plain = normalizers == ["BertNormalizer"] and self.normalizers[0].get("handle_chinese_chars", False)
        return plain and [part.get("type") for part in self.pre_tokenizers] == ["BertPreTokenizer"]

    @cached_property
    def drops_blanks(self) -> bool:
        """Whether a row of blanks is as good as one."""
        first = {part.get("type") for part in self.pre_tokenizers[:1]}
        kept = self.kinds & {"Replace", "Prepend", "ByteLevel"}
        return first <= DROPS_BLANKS and bool(first) and not kept and all(token.content.strip() for token in self.added)

    @cached_property
    def parts_words(self) -> bool:
        """Whether a word ends before a single space, whatever follows."""
        if self.tokenizer.pre_tokenizer is None:
            signs = [part for part in self.normalizers if part.get("pattern") == {"String": " "}]
            known = [part.get("content") for part in signs] == [BLANK_SIGN] and self.model in ("BPE", "Unigram")
            return known and not self.joins_words
        ends = {end for _, (_, end) in self.tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)}
        return all(index in ends for index, char in enumerate(PROBE) if char == " ")

    @cached_property
    def word_limit(self) -> int:
        """Characters of the longest word that the model knows; 0 where a word is never taken as a whole."""
        if self.model == "WordPiece":
            return int(self.tokenizer.model.max_input_chars_per_word)
        return self.longest if self.model == "WordLevel" else 0

    @cached_property
    def has_prefixes(self) -> bool:
        """Whether tokens up to the end of any token are those of the text up to there."""
        if self.model == "BPE":
            return not self.tokenizer.model.end_of_word_suffix
        return self.model in ("Unigram", "WordPiece", "WordLevel")

    @cached_property
    def has_plain_start(self) -> bool:
        """Whether a text that begins later gives the same tokens from there on."""
        return not self.kinds & {"Strip", "Prepend"}


def _parts(part: Any, key: str) -> list[dict[str, Any]]:
    """A component as JSON, sequences laid out flat."""
    return [] if part is None else list(_flat(json.loads(part.__getstate__()), key))


def _flat(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    if record.get("type") != "Sequence":
        return [record]
    return [inner for item in record[key] for inner in _flat(item, key)]


def _expression(part: dict[str, Any]) -> str | None:
    """The regular expression of a part; None where it is a plain string."""
    pattern = part.get("pattern", {})
    return pattern.get("Regex") if isinstance(pattern, dict) else None
