"""The part of the interface's description that is about models which write text."""

from typing import Any

_COUNT = {"type": "integer", "minimum": 1}
_COMMON: dict[str, Any] = {
    "model": {"type": "string", "description": "NAME or NAME:CUSTOMER; without it the first one's base answers"},
    "max_tokens": _COUNT | {"default": 256},
    "temperature": {"type": "number", "default": 1.0, "description": "0 is greedy"},
    "top_p": {"type": "number", "default": 1.0},
    "top_k": {"type": "integer", "default": 0},
    "min_p": {"type": "number", "default": 0.0},
    "repetition_penalty": {"type": "number", "default": 1.0},
    "presence_penalty": {"type": "number", "default": 0.0},
    "frequency_penalty": {"type": "number", "default": 0.0},
    "n": _COUNT | {"default": 1},
    "seed": {"type": "integer"},
    "stop": {"type": ["string", "array"], "items": {"type": "string"}},
    "stream": {"type": "boolean", "default": False},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"type": ["string", "array"]},
    },
}
_ANSWER: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "model", "base_digest", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["text_completion", "chat.completion"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "base_digest": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "object"}},
        "usage": {"type": "object"},
    },
}

SCHEMAS: dict[str, Any] = {
    "CompletionRequest": {
        "type": "object",
        "required": ["prompt"],
        "properties": {"prompt": {"type": ["string", "array"]}, "logprobs": {"type": "integer"}, **_COMMON},
        "example": {"model": "text:acme", "prompt": "Where is my parcel?"},
    },
    "ChatRequest": {
        "type": "object",
        "required": ["messages"],
        "properties": {
            "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
            "max_completion_tokens": _COUNT,
            "logprobs": {"type": "boolean"},
            "top_logprobs": {"type": "integer"},
            **_COMMON,
        },
        "example": {"model": "text:acme", "messages": [{"role": "user", "content": "Where is my parcel?"}]},
    },
    "TextAnswer": _ANSWER,
}
