"""Requests for text in the shape of OpenAI's interface: what is asked, and what is not offered. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.runtime.generation.requests import DEFAULT_TOKENS, GenerationRequest
from qrlora_deploy.runtime.generation.sampling import MOST_SEED, Sampling, out_of_range
from qrlora_deploy.runtime.generation.stopping import MOST_CHARACTERS, MOST_STOPS

MOST_COPIES = 128
"""Answers to one prompt."""

MOST_PROMPTS = 4096

SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Fields that `Sampling` has under the same name, and whose defaults are its own."""

COMMON = ("model", "max_tokens", "temperature", "n", "stop", "seed", "stream", "stream_options", "logprobs", *SAMPLING)

PASSED_OVER = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""What says nothing about the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "prediction": (),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}
"""What is not offered, and the values that ask for nothing; null is one everywhere."""


@dataclass(frozen=True)
class TextRequest:
    """What is asked.

    Attributes:
        model: its name; None: the first one.
        customer: None: the base.
        requests: one for each prompt.
        copies: answers to each.
        is_chat: they are chats.
        stream: whether the answer comes piece by piece.
        include_usage: whether the last piece of a stream counts tokens.
    """

    model: str | None
    customer: str | None
    requests: list[GenerationRequest]
    copies: int
    is_chat: bool
    stream: bool
    include_usage: bool


def parse_completion(record: Mapping[str, Any]) -> TextRequest:
    """Read the body of `/v1/completions`.

    Raises:
        MalformedInputError: a field is missing, unknown or of another type, or asks for what is not offered.
    """
    _check_fields(record, ("prompt",))
    logprobs = _whole(record, "logprobs")
    return _request(record, _prompts(record.get("prompt")), logprobs, is_chat=False)


def parse_chat(record: Mapping[str, Any]) -> TextRequest:
    """Read the body of `/v1/chat/completions`.

    Raises:
        MalformedInputError: as `parse_completion`.
    """
    _check_fields(record, ("messages", "max_completion_tokens", "top_logprobs"))
    wanted, best = _flag(record, "logprobs"), _whole(record, "top_logprobs")
    if best is not None and not wanted:
        raise MalformedInputError("top_logprobs needs logprobs to be true")
    return _request(record, [_messages(record.get("messages"))], (best or 0) if wanted else None, is_chat=True)


def _check_fields(record: Mapping[str, Any], own: tuple[str, ...]) -> None:
    known = (*own, *COMMON)
    for name, value in record.items():
        if name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise MalformedInputError(f"{name} is not offered; leave it out")
        elif name not in known and name not in PASSED_OVER:
            raise MalformedInputError(f"there is no field {name!r:.60}; choose from {', '.join(known)}")


def _request(record: Mapping[str, Any], prompts: list[Any], logprobs: int | None, is_chat: bool) -> TextRequest:
    model, customer = _owner(record)
    copies = _whole(record, "n", 1)
    if not 1 <= copies <= MOST_COPIES:
        raise MalformedInputError(f"n must be from 1 to {MOST_COPIES}, not {copies}")
    tokens = _whole(record, "max_tokens")
    if is_chat and record.get("max_completion_tokens") is not None:
        tokens = _whole(record, "max_completion_tokens")
    stop, sampling = _stops(record.get("stop")), _sampling(record, logprobs)
    options = _options(record)
    if tokens is not None and tokens < 1:
        raise MalformedInputError(f"max_tokens must be at least 1, not {tokens}")
    most = DEFAULT_TOKENS if tokens is None else tokens
    requests = [GenerationRequest(prompt, customer, sampling, most, stop) for prompt in prompts]
    return TextRequest(model, customer, requests, copies, is_chat, _flag(record, "stream"), options)


def split_name(name: str | None) -> tuple[str | None, str | None]:
    """A model's name and a customer's: `base:customer`; the base where there is none.

    Raises:
        MalformedInputError: nothing stands before or behind the colon, as where a client's variable is empty: the base
            would answer in the place of a customer.
    """
    model, colon, customer = (name or "").partition(":")
    if colon and not (model and customer):
        raise MalformedInputError("model must be NAME or NAME:CUSTOMER; one of the two is empty")
    return model or None, customer or None


def _owner(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    name = record.get("model")
    if not isinstance(name, str | None):
        raise MalformedInputError("model must be a text: the model's name, or NAME:CUSTOMER")
    return split_name(name)


def _sampling(record: Mapping[str, Any], logprobs: int | None) -> Sampling:
    given = {name: record[name] for name in SAMPLING if record.get(name) is not None}
    temperature, seed = record.get("temperature"), _whole(record, "seed")
    # OpenAI's default, not ours.
    given["temperature"] = 1.0 if temperature is None else temperature
    for name, value in (given | ({} if logprobs is None else {"logprobs": logprobs})).items():
        if wrong := out_of_range(name, value):
            raise MalformedInputError(f"{name} {wrong}")
    # OpenAI's seeds are signed.
    return Sampling(seed=None if seed is None else seed & MOST_SEED, logprobs=logprobs, **given)


def _options(record: Mapping[str, Any]) -> bool:
    """Whether a stream counts tokens at its end."""
    options = record.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not _flag(record, "stream"):
        raise MalformedInputError("stream_options must be an object, and needs stream to be true")
    return _flag(options, "include_usage")


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(found, list)
        or len(found) > MOST_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= MOST_CHARACTERS for text in found)
    ):
        raise MalformedInputError(
            f"stop must be a text, or up to {MOST_STOPS} texts, of 1 to {MOST_CHARACTERS} characters"
        )
    return tuple(found)


def _prompts(value: Any) -> list[Any]:
    """Texts, or ids of tokens: one prompt or a list of them."""
    if isinstance(value, str) or _all(value, _is_id):
        return [value]
    if (_all(value, lambda item: isinstance(item, str)) or _all(value, lambda item: _all(item, _is_id))) and len(
        value
    ) <= MOST_PROMPTS:
        return list(value)
    raise MalformedInputError(
        f"prompt must be a text, ids of tokens, or a list of up to {MOST_PROMPTS:,} texts or of such lists of ids"
    )


def _all(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(is_right(item) for item in value)


def _is_id(value: Any) -> bool:
    return type(value) is int


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise MalformedInputError("messages must be a list of objects, one at least")
    return [_message(number, item) for number, item in enumerate(value)]


def _message(number: int, item: Mapping[str, Any]) -> dict[str, str]:
    """Role and content; the newer name of the system is its old one, which templates know."""
    role, content = item.get("role"), item.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if role not in ("system", "developer", "user", "assistant") or not isinstance(content, str):
        raise MalformedInputError(
            f"message {number} needs a role (system, developer, user or assistant) and content, a text or parts of text"
        )
    if item.get("tool_calls") or item.get("function_call"):
        raise MalformedInputError(f"message {number} calls tools, which are not offered")
    return {"role": "system" if role == "developer" else role, "content": content}


def _flag(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name)
    if not isinstance(value, bool | None):
        raise MalformedInputError(f"{name} must be true or false")
    return bool(value)


def _whole(record: Mapping[str, Any], name: str, default: Any = None) -> Any:
    value = record.get(name)
    if value is None:
        return default
    if type(value) is not int:
        raise MalformedInputError(f"{name} must be a whole number, not {value!r:.40}")
    return value
