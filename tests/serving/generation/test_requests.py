"""What bodies for text ask, whatever is in them."""

from typing import Any

import pytest

pytest.importorskip("orjson", reason="needs the extra serve")

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.serving.generation.asking import load_of
from qrlora_deploy.serving.http.completions_request import NEUTRAL, parse_chat, parse_completion, split_name

SAID = [{"role": "user", "content": "hello"}]


def test_what_is_absent_is_as_openai_has_it() -> None:
    asked = parse_completion({"prompt": "a"})
    (request,) = asked.requests
    assert (asked.model, asked.customer, asked.copies, asked.stream) == (None, None, 1, False)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.seed) == (1.0, 1.0, None)
    assert request.max_tokens == 256


def test_fields_become_a_request() -> None:
    record = {"model": "text:acme", "messages": SAID, "max_tokens": 3, "max_completion_tokens": 4, "seed": -1}
    record |= {"temperature": 0, "top_k": 5, "stop": "x", "logprobs": True, "top_logprobs": 2, "n": 3, "stream": True}
    asked = parse_chat(record | {"stream_options": {"include_usage": True}, "user": "me", "metadata": {"a": "b"}})
    (request,) = asked.requests
    assert (asked.model, asked.customer, asked.copies) == ("text", "acme", 3)
    assert asked.stream and asked.include_usage and asked.is_chat
    assert (request.max_tokens, request.stop, request.customer) == (4, ("x",), "acme")
    assert (request.sampling.top_k, request.sampling.logprobs, request.sampling.seed) == (5, 2, 2**64 - 1)


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_not_offered_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        parse_completion({"prompt": "a", name: value})
    with pytest.raises(MalformedInputError, match=f"^{name} is not offered; leave it out$"):
        parse_completion({"prompt": "a", name: ["something"]})


def test_roles_and_parts_become_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = parse_chat({"messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]})
    assert asked.requests[0].prompt == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
    ]


def test_a_name_is_split_at_its_first_colon() -> None:
    assert split_name("text:a:b") == ("text", "a:b")
    assert split_name("text") == ("text", None)
    assert split_name(None) == split_name("") == (None, None)
    for empty in ("text:", ":acme", ":"):
        with pytest.raises(MalformedInputError, match="one of the two is empty"):
            split_name(empty)


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("äb", 3 + 4 + 10), ([1, 2, 3], 13), ([{"role": "user", "content": "abc"}], 3 + 128 + 10), ("a" * 5000, 1000)],
)
def test_what_is_reserved_is_the_most_that_a_prompt_can_take(prompt: Any, tokens: int) -> None:
    request = GenerationRequest(prompt, max_tokens=10)
    load = load_of([request, request], 3, 1000, "key")
    assert (load.rows, load.tokens, load.asker) == (6, 6 * tokens, "key")
