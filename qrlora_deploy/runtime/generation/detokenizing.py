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

    Special tokens give no text. A tokenizer that spells rare characters byte by byte (`ByteFallback`) shows all
    bytes of a run as broken where one is; pieces show those as characters that were whole when they came.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        prompt: ids of the prompt, of which the last ones are the context of the first token.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-CONTEXT:])
        self._known = len(self._window)
        self._shown = len(self._decode())

    def feed(self, token: int) -> str:
        """The text that is complete with `token`; empty where a character still lacks bytes."""
        self._window.append(token)
        text = self._decode()
        if not text.endswith(INCOMPLETE):
            return self._take(text)
        if len(self._window) - self._known < LONGEST_HELD:
            return ""
        # Only the last character can still become another one.
        start, self._shown = self._shown, max(self._shown, len(text) - 1)
        return text[start : self._shown]

    def end(self) -> str:
        """What is left: bytes that never became a character, shown as the replacement character."""
        return self._take(self._decode())

    def _take(self, text: str) -> str:
        piece = text[self._shown :]
        if piece:
            # The last piece is the context of the next one; the window then begins with a whole character.
            self._window = self._window[self._known :]
            self._known = len(self._window)
            self._shown = len(self._decode())
        return piece

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=True)
        return text
