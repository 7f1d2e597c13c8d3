"""A decoder behind `serve --processes`: fronts ask an engine; answers, streams and ends are those of one process."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.runtime.generation.written import Written, write_everything
from tests.serving.generation.place import NEW, alone
from tests.serving.process import Served
from tests.serving.test_processes import children, is_ready

pytestmark = [pytest.mark.slow, pytest.mark.makes]

PROMPTS = ("where is my parcel", "play some music", "what is the weather")
OWNERS = (None, "one", "two", "three")
LONG = {"prompt": "play some music", "model": "switchable", "max_tokens": 100, "temperature": 1.0, "seed": 1, "n": 40}
DEADLINE_S = 40.0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_everything(tmp_path_factory.mktemp("written"))


def serve(written: Written) -> Served:
    options = ("--customers", written.customers, "--threads", 1, "--processes", 2, "--max-answers", 4)
    return Served(written.bundle, *options, cwd=written.bundle.parent)


@pytest.fixture(scope="module")
def server(written: Written) -> Iterator[Served]:
    with serve(written) as found:
        yield found


def named(owner: str | None) -> str:
    return "switchable" if owner is None else f"switchable:{owner}"


def post(server: Served, path: str, record: Any) -> httpx.Response:
    # A connection for each: the next one may be another front's.
    return httpx.post(server.url + path, json=record, timeout=30)


def records(server: Served, path: str, record: Any, begun: Callable[[], None] = lambda: None) -> list[Any]:
    """What a stream tells."""
    found = []
    with httpx.stream("POST", server.url + path, json=record | {"stream": True}, timeout=30) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
                if len(found) == 1:
                    begun()
    return found


def metric(server: Served, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_customers_side_by_side_answer_as_by_pytorch(written: Written, server: Served) -> None:
    asked = [(prompt, owner) for prompt in PROMPTS for owner in OWNERS]

    def answer(it: tuple[str, str | None]) -> Any:
        prompt, owner = it
        record = {"model": named(owner), "prompt": prompt, "max_tokens": NEW, "temperature": 0}
        whole = post(server, "/v1/completions", record).json()["choices"][0]
        *pieces, last = records(server, "/v1/completions", record | {"stream_options": {"include_usage": True}})
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["text"]
        assert last["usage"]["completion_tokens"] > 0
        return whole["text"].strip()

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(answer, asked))
    assert found == [written.greedy(prompt, owner, NEW) for prompt, owner in asked]
    assert len(set(found)) > len(PROMPTS)
    assert metric(server, "qrlora_answer_tokens_total") > 2 * len(asked)


def test_chats_draws_and_logprobs_are_those_of_one_process(written: Written, server: Served) -> None:
    messages = [{"role": "user", "content": PROMPTS[0]}]
    record = {"model": named("two"), "messages": messages, "temperature": 0, "max_tokens": NEW}
    found = post(server, "/v1/chat/completions", record).json()["choices"][0]["message"]["content"]
    assert found == alone(written, messages, "two")
    drawn = record | {"temperature": 1.2, "seed": 2**64 - 2, "n": 2, "logprobs": True, "top_logprobs": 2}
    first, again = (post(server, "/v1/chat/completions", drawn).json()["choices"] for _ in range(2))
    assert first == again and first[0]["message"] != first[1]["message"]
    assert first[0]["seed"] == 2**64 - 2 and len(first[0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    text = post(server, "/v1/completions", LONG | {"n": 1}).json()["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    cut = post(server, "/v1/completions", LONG | {"n": 1, "stop": [stop]}).json()["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_what_is_wrong_has_the_status_of_one_process(server: Served) -> None:
    record = {"prompt": "a", "max_tokens": 4}
    for path, asked in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        reply = post(server, f"/v1/{path}", {"model": named("nobody"), **asked})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_customer")
    assert httpx.get(f"{server.url}/v1/models/{named('nobody')}").status_code == 404
    assert httpx.get(f"{server.url}/v1/models/{named('one')}").json()["id"] == named("one")
    for prompt in ("", "a " * 500, [10**6]):
        reply = post(server, "/v1/completions", record | {"prompt": prompt})
        assert reply.status_code == 400, reply.text


def test_who_goes_away_frees_the_rows(server: Served) -> None:
    before = metric(server, "qrlora_cancelled_answers_total")
    with httpx.stream("POST", server.url + "/v1/completions", json=LONG | {"stream": True}) as reply:
        next(reply.iter_lines())
    until(lambda: metric(server, "qrlora_running_answers") == 0)
    assert metric(server, "qrlora_cancelled_answers_total") > before


def test_a_killed_front_frees_its_rows_and_a_killed_engine_is_told_in_the_stream(written: Written) -> None:
    with serve(written) as server, ThreadPoolExecutor(1) as pool:
        expected = post(server, "/v1/completions", LONG | {"n": 2}).json()["choices"]
        for front in children(server, "front"):
            asked = pool.submit(records, server, "/v1/completions", LONG)
            until(lambda: metric(server, "qrlora_running_answers") > 0)
            os.kill(front, signal.SIGKILL)
            # It was this front's, or the other's, and then it is whole.
            error = asked.exception()
            assert error is None or isinstance(error, httpx.TransportError)
            until(lambda: is_ready(server.url) and metric(server, "qrlora_running_answers") == 0)
        (engine,) = children(server, "engine")
        told = records(server, "/v1/completions", LONG, lambda: os.kill(engine, signal.SIGKILL))
        assert "the engine ended before the request was answered" in told[-1]["error"]["message"]
        until(lambda: is_ready(server.url))
        again = post(server, "/v1/completions", LONG | {"n": 2}).json()["choices"]
        assert [choice["text"] for choice in again] == [choice["text"] for choice in expected]


def test_what_is_being_written_is_written_to_its_end_at_sigterm(written: Written) -> None:
    with serve(written) as server:
        expected = post(server, "/v1/completions", LONG | {"n": 6}).json()["choices"]
        told = records(server, "/v1/completions", LONG | {"n": 6}, lambda: server.send(signal.SIGTERM))
        texts: dict[int, str] = {}
        for record in told:
            (choice,) = record["choices"]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert texts == {choice["index"]: choice["text"] for choice in expected}
        assert server.wait() == 0
