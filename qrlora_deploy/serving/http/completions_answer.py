"""Answers of text in the shape of OpenAI's interface, whole and piece by piece."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationEvent
from qrlora_deploy.runtime.generation.sampling import Choice
from qrlora_deploy.serving.http.completions_request import TextRequest

UNKNOWN_CHARACTER = "�"

TextOf = Callable[[int], str]
"""What is shown of a token."""


@dataclass
class Shape:
    """How the answers to one request are written.

    Args:
        asked: the request.
        model: the name that is told: `NAME`, or `NAME:CUSTOMER`.
        base_digest: of the base's weights.
        text_of: shows a token.

    Attributes:
        identity: of the answer.
        created_s: when it was begun, in seconds of the Unix epoch.
    """

    asked: TextRequest
    model: str
    base_digest: str
    text_of: TextOf
    identity: str = field(default_factory=lambda: secrets.token_hex(12))
    created_s: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)
    _held: dict[int, list[Choice]] = field(default_factory=dict)
    _told: dict[int, int] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)
    _ended: dict[int, GenerationAnswer] = field(default_factory=dict)

    def whole(self, answers: Sequence[GenerationAnswer]) -> dict[str, Any]:
        """The body of an answer that comes at once."""
        choices = []
        for number, answer in enumerate(answers):
            text = {"message": _said(answer.text)} if self.asked.is_chat else {"text": answer.text}
            logprobs = self._logprobs(number, answer.logprobs)
            choices.append({"index": number, **text, "logprobs": logprobs, **self._end(answer)})
        return self._head("") | {"choices": choices, "usage": self.usage(answers)}

    def piece(self, event: GenerationEvent) -> dict[str, Any] | None:
        """A piece of an answer; None where nothing can be seen of what happened."""
        choices = self._released(event) if self._tells_logprobs else []
        if not (event.text or choices or event.answer):
            return None
        if event.answer is not None:
            self._ended[event.number] = event.answer
        choice = {"index": event.number, **self._grown(event), "logprobs": self._logprobs(event.number, choices)}
        choice |= {"finish_reason": None} if event.answer is None else self._end(event.answer)
        usage = {"usage": None} if self.asked.include_usage else {}
        return self._head(".chunk") | {"choices": [choice]} | usage

    def last(self) -> dict[str, Any] | None:
        """What counts the tokens of a stream that has ended, where that was asked for."""
        if not self.asked.include_usage:
            return None
        answers = [self._ended[number] for number in sorted(self._ended)]
        return self._head(".chunk") | {"choices": [], "usage": self.usage(answers)}

    def usage(self, answers: Sequence[GenerationAnswer]) -> dict[str, Any]:
        """Tokens: of each prompt once, and of every answer."""
        first = answers[:: self.asked.copies]
        read, written = sum(it.prompt_tokens for it in first), sum(len(it.tokens) for it in answers)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(it.reused_tokens for it in first)},
        }

    def _released(self, event: GenerationEvent) -> list[Choice]:
        """The tokens that are told now: as its text, one is held back while it may be a stop string's."""
        held, told = self._held.setdefault(event.number, []), self._told.get(event.number, 0)
        held += event.choices
        count = event.shown - told
        self._told[event.number] = event.shown
        released, held[:count] = held[:count], []
        return released

    @property
    def _tells_logprobs(self) -> bool:
        return self.asked.requests[0].sampling.logprobs is not None

    def _head(self, kind: str) -> dict[str, Any]:
        prefix, name = ("chatcmpl", f"chat.completion{kind}") if self.asked.is_chat else ("cmpl", "text_completion")
        return {
            "id": f"{prefix}-{self.identity}",
            "object": name,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": f"fp_{self.base_digest.rpartition(':')[2][:16]}",
            "base_digest": self.base_digest,
        }

    def _grown(self, event: GenerationEvent) -> dict[str, Any]:
        if not self.asked.is_chat:
            return {"text": event.text}
        role = {} if event.number in self._begun else {"role": "assistant"}
        self._begun.add(event.number)
        return {"delta": role | ({"content": event.text} if event.text or role else {})}

    def _end(self, answer: GenerationAnswer) -> dict[str, Any]:
        return {
            "finish_reason": answer.finish_reason,
            "customer_digest": answer.customer_digest,
            "seed": answer.seed,
        }

    def _logprobs(self, number: int, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if not self._tells_logprobs or not choices:
            return None
        if self.asked.is_chat:
            return {"content": list(self._chat_logprobs(choices)), "refusal": None}
        texts = [self.text_of(choice.token) for choice in choices]
        count = self.asked.requests[0].sampling.logprobs
        return {
            "tokens": texts,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [self._best(choice) for choice in choices] if count else None,
            "text_offset": list(self._offsets_of(number, texts)),
        }

    def _best(self, choice: Choice) -> dict[str, float]:
        """By what is shown of a token; the better one where two are shown alike."""
        found: dict[str, float] = {}
        for token, logprob in choice.best:
            found.setdefault(self.text_of(token), logprob)
        return found

    def _offsets_of(self, number: int, texts: Iterable[str]) -> Iterator[int]:
        for text in texts:
            offset = self._offsets.get(number, 0)
            self._offsets[number] = offset + len(text)
            yield offset

    def _chat_logprobs(self, choices: Iterable[Choice]) -> Iterator[dict[str, Any]]:
        for choice in choices:
            best = [self._token(token, logprob) for token, logprob in choice.best]
            yield self._token(choice.token, choice.logprob) | {"top_logprobs": best}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.text_of(token)
        # Of a part of a character the bytes are not known.
        known = None if UNKNOWN_CHARACTER in text else list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": logprob, "bytes": known}


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "refusal": None}
