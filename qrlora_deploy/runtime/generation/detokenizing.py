"""Tokens to text as they come."""

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""What a decoder gives for bytes that are no whole character, or not yet."""

CONTEXT = 8
"""Last tokens of the prompt that are decoded along: the first word of an answer keeps the space before it."""

LONGEST_HELD = 16
"""Tokens that are waited for to complete a character, which has four bytes at most; then they are shown as they are."""


class StreamingDecoder:
    """Gives the text that each token adds, in whole characters. The pieces together are the text of all tokens.

    Special tokens give no text.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        prompt: ids of the prompt, of which the last ones are the context of the first token.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-CONTEXT:])
        self._known = len(self._window)
        self._before = self._decode(self._window)

    def feed(self, token: int) -> str:
        """The text that is complete with `token`; empty where a character still lacks bytes."""
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._known
        if text.endswith(INCOMPLETE) and waiting < LONGEST_HELD:
            return ""
        return self._take(text)

    def end(self) -> str:
        """What is left: bytes that never became a character, shown as the replacement character."""
        return self._take(self._decode(self._window))

    def _take(self, text: str) -> str:
        piece = text[len(self._before) :]
        if piece:
            # The last piece is the context of the next one.
            self._window = self._window[self._known :]
            self._known = len(self._window)
            self._before = self._decode(self._window)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
