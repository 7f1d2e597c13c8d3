"""OpenAI's own Python client against a server."""

from collections.abc import Iterator

import pytest

pytest.importorskip("openai", reason="needs the package openai")
pytest.importorskip("torch", reason="makes bundles")
pytest.importorskip("orjson", reason="needs the extra serve")

import openai

from tests.runtime.generation.written import Written, write_everything
from tests.serving.generation.place import NEW, Served, alone, served

pytestmark = [pytest.mark.slow, pytest.mark.makes]

SAID = [{"role": "user", "content": "where is my parcel?"}]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_everything(tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module")
def server(written: Written) -> Iterator[Served]:
    with served(written) as found:
        yield found


def test_the_client_works_unchanged(written: Written, server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["text"]
    asked = {"model": "text:one", "messages": SAID, "temperature": 0, "max_tokens": NEW}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.message.content == alone(written, SAID, "one")
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(it.choices[0].delta.content or "" for it in pieces[:-1]) == choice.message.content
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    found = client.completions.create(model="text", prompt="what is", temperature=0, max_tokens=NEW)
    assert found.choices[0].text == alone(written, "what is", None)
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="text:nobody", prompt="a")
    assert refused.value.code == "unknown_customer"
    with pytest.raises(openai.BadRequestError, match="top_k must be"):
        client.completions.create(model="text", prompt="a", extra_body={"top_k": -1})
