"""An answer that grows token by token: its text, and when it ends."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any

from qrlora_deploy.runtime.generation.detokenizing import StreamingDecoder
from qrlora_deploy.runtime.generation.requests import FinishReason
from qrlora_deploy.runtime.generation.sampling import Choice, Sampler, Sampling
from qrlora_deploy.runtime.generation.stopping import StopStrings


class Writer:
    """Writes one answer.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        prompt: ids of the prompt.
        ends: ids of the tokens by which the model ends an answer.
        sampling: how tokens are chosen.
        stops: stop strings, checked.
        max_tokens: tokens at most.

    Attributes:
        sampler: chooses the tokens.
        choices: the tokens so far.
        finished: why the answer has ended; None while it goes on.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        ends: Collection[int],
        sampling: Sampling,
        stops: Sequence[str],
        max_tokens: int,
    ) -> None:
        self.sampler = Sampler(sampling, prompt)
        self.choices: list[Choice] = []
        self.finished: FinishReason | None = None
        self._ends, self._max_tokens = ends, max_tokens
        self._decoder = StreamingDecoder(tokenizer, prompt)
        self._stops, self._has_stops = StopStrings(stops), bool(stops)
        self._pieces: list[str] = []
        # Characters of the text that are known, and that may be shown; where each token's begin.
        self._known = self._kept = 0
        self._starts: list[int] = []

    @property
    def text(self) -> str:
        """The answer so far, without what is held back."""
        return "".join(self._pieces)

    @property
    def stop(self) -> str | None:
        """The stop string that ended it."""
        return self._stops.found

    @property
    def shown(self) -> int:
        """How many of the tokens are no part of a stop string, for certain: those that begin in the text, and all
        of them when it ended without one."""
        if not self._has_stops or (self.finished is not None and self.stop is None):
            return len(self.choices)
        return bisect_left(self._starts, self._kept)

    def write(self, choice: Choice) -> str:
        """Take a token; returns what the text grew by."""
        self.choices.append(choice)
        self._starts.append(self._known)
        if choice.token in self._ends:
            # It ends the text and is no part of it, whether the tokenizer calls it special or not.
            return self.finish("stop")
        known = self._decoder.feed(choice.token)
        self._known += len(known)
        piece = self._stops.feed(known)
        if self._stops.found is not None:
            self.finished = "stop"
        elif len(self.choices) >= self._max_tokens:
            return self._keep(piece) + self.finish("length")
        return self._keep(piece)

    def finish(self, reason: FinishReason) -> str:
        """End the answer; returns what was held back."""
        rest = self._stops.feed(self._decoder.end())
        self.finished = "stop" if self._stops.found is not None else reason
        return self._keep(rest + self._stops.end())

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
            self._kept += len(piece)
        return piece
