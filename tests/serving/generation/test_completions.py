"""Text over the network, held against PyTorch's and a session's own answers."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("torch", reason="makes bundles")
pytest.importorskip("orjson", reason="needs the extra serve")

from qrlora_deploy.errors import InputError, MalformedInputError
from qrlora_deploy.runtime.generation.session import GenerationSession
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.engine.rows import Load
from qrlora_deploy.serving.generation.engine import TextEngine
from qrlora_deploy.serving.keys_file import empty_keys, with_key, write_keys
from qrlora_deploy.serving.opening import ModelPlaces, OpenModel, RunOptions
from qrlora_deploy.serving.refusals import QuotaError
from tests.cli.running import run_here
from tests.runtime.generation.tiny import NAMES
from tests.runtime.generation.written import Written, write_everything
from tests.serving.generation.place import NEW, Served, alone, name_of, served

pytestmark = [pytest.mark.slow, pytest.mark.makes]

PROMPTS = ("play some music", "where is my parcel?", "book a flight to berlin", "what is my balance")
OWNERS = (None, *NAMES)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_everything(tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module")
def server(written: Written) -> Iterator[Served]:
    with served(written) as found:
        yield found


def said(record: Any) -> str:
    """The one answer; what it begins with parts it from the prompt."""
    (choice,) = record["choices"]
    return str(choice["text"]).strip()


def wait_for(holds: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_customers_side_by_side_answer_as_by_pytorch(written: Written, server: Served) -> None:
    asked = [(prompt, owner) for prompt in PROMPTS for owner in OWNERS]
    steps = server.engine.stats().batches
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda it: said(server.complete(it[0], it[1])), asked))
    assert found == [written.greedy(prompt, owner, NEW) for prompt, owner in asked]
    assert len(set(found)) > len(PROMPTS)
    # They were written together, and not one after the other.
    assert server.engine.stats().batches - steps < len(asked) * NEW / 2


def test_a_body_says_what_answered_and_counts_tokens(written: Written, server: Served) -> None:
    record = server.complete(PROMPTS[0], "one")
    (choice,) = record["choices"]
    assert (record["object"], record["model"]) == ("text_completion", "text:one")
    assert choice["customer_digest"] == written.customer("one").digest
    assert record["base_digest"] == written.made.checkpoint.digest
    assert choice["finish_reason"] in ("stop", "length")
    usage = record["usage"]
    assert usage["completion_tokens"] == NEW or choice["finish_reason"] == "stop"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_is_the_whole_answer_in_pieces(written: Written, server: Served, path: str) -> None:
    chat = "chat" in path
    prompt = {"messages": [{"role": "user", "content": PROMPTS[1]}]} if chat else {"prompt": PROMPTS[1]}
    record = {"model": "text:two", "temperature": 0, "max_tokens": NEW, "n": 2, **prompt}
    whole = server.post(path, record).json()
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last, done = server.events(path, record | stream)
    assert (
        done == "[DONE]"
        and last["choices"] == []
        and last["usage"] == whole["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
    )
    for number in (0, 1):
        mine = [it["choices"][0] for it in pieces if it["choices"][0]["index"] == number]
        texts = [it["delta"].get("content", "") if chat else it["text"] for it in mine]
        expected = whole["choices"][number]["message"]["content"] if chat else whole["choices"][number]["text"]
        assert "".join(texts) == expected and expected
        assert [it["finish_reason"] for it in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == whole["choices"][number]["finish_reason"]
    messages = [{"role": "user", "content": PROMPTS[1]}]
    assert expected == alone(written, messages if chat else PROMPTS[1], "two")


def test_who_goes_away_frees_the_row_and_changes_nothing_else(written: Written) -> None:
    with served(written, answers=2) as server:
        server.slow_down()
        record = {"prompt": "play some music", "max_tokens": 100, "temperature": 1.0, "seed": 1, "stream": True}
        client = httpx.Client()
        request = client.build_request("POST", server.url + "/v1/completions", json=record | {"n": 2})
        reply = client.send(request, stream=True)
        next(reply.iter_lines())
        wait_for(lambda: server.engine.written().running == 2)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(server.complete, PROMPTS[2], "one")
            reply.close()
            client.close()
            assert said(other.result()) == written.greedy(PROMPTS[2], "one", NEW)
        wait_for(lambda: server.engine.written().running == 0)
        assert server.engine.written().cancelled >= 1
        assert server.engine.stats().queued_rows == 0


def test_who_goes_away_before_the_whole_answer_frees_the_row(written: Written) -> None:
    with served(written, answers=1) as server:
        server.slow_down()
        record = {"prompt": "play some music", "max_tokens": 100, "temperature": 0, "n": 40}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/completions", json=record, timeout=0.2)
        wait_for(lambda: not server.engine.stats().queued_rows and not server.engine.written().running)
        assert server.engine.written().cancelled >= 1


def test_stop_logprobs_and_ids(written: Written, server: Served) -> None:
    whole = server.complete(PROMPTS[3], "three", logprobs=2)["choices"][0]
    text, logprobs = whole["text"], whole["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
    for chosen, best in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert chosen == pytest.approx(max(best.values())) and chosen < 0
    middle = text[len(text) // 2 :][:2]
    cut = server.complete(PROMPTS[3], "three", stop=[middle])["choices"][0]
    assert cut["text"] == text[: text.index(middle)] and cut["finish_reason"] == "stop"
    ids = server.engine.session.read(_request(PROMPTS[3]))
    assert server.complete(ids, "three")["choices"][0]["text"] == text  # type: ignore[arg-type]
    both = server.complete([PROMPTS[3], PROMPTS[0]], "three", n=2)  # type: ignore[arg-type]
    assert [it["index"] for it in both["choices"]] == [0, 1, 2, 3]
    other = written.greedy(PROMPTS[0], "three", NEW)
    assert [it["text"].strip() for it in both["choices"]] == [text.strip()] * 2 + [other] * 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_tokens_of_a_stop_string_have_no_logprobs_in_a_stream_nor_at_once(server: Served, path: str) -> None:
    chat = "chat" in path
    asked = {"messages": [{"role": "user", "content": PROMPTS[3]}]} if chat else {"prompt": PROMPTS[3]}
    told = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    record = {"model": "text:three", "temperature": 0, "max_tokens": NEW, **asked, **told}

    def tokens_of(choices: list[Any]) -> list[Any]:
        """Each token with its log probability."""
        told = [it["logprobs"] for it in choices if it["logprobs"]]
        if chat:
            return [(token["token"], token["logprob"]) for it in told for token in it["content"]]
        return [pair for it in told for pair in zip(it["tokens"], it["token_logprobs"], strict=True)]

    def text_of(choice: Any) -> str:
        text: str = choice["message"]["content"] if chat else choice["text"]
        return text

    free = server.post(path, record).json()["choices"][0]
    tokens = tokens_of([free])
    # The second of them is another answer's: what begins as it does is held back, and shown in the end.
    middle = text_of(free)[len(text_of(free)) // 2 :][:3]
    for stop in ([middle], [middle[0] + "no such text"]):
        whole = server.post(path, record | {"stop": stop}).json()["choices"][0]
        *pieces, _ = server.events(path, record | {"stop": stop, "stream": True})
        found = tokens_of([it["choices"][0] for it in pieces])
        assert found == tokens_of([whole]) == tokens[: len(found)]
        if stop[0] != middle:
            assert (text_of(whole), found) == (text_of(free), tokens)
        else:
            # The last one may begin in the text and end in the stop string; tokens show no blanks here.
            cut, shown = "".join(token for token, _ in found), text_of(whole).replace(" ", "")
            assert cut.startswith(shown) and len(cut) < len(shown) + len(found[-1][0]) and len(found) < len(tokens)


def _request(prompt: str) -> Any:
    from qrlora_deploy.runtime.generation.requests import GenerationRequest

    return GenerationRequest(prompt)


def test_a_chat_tells_logprobs_and_draws_by_seed(server: Served) -> None:
    record = {"model": "text", "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}
    record |= {"max_tokens": 6, "seed": -5, "n": 2, "logprobs": True, "top_logprobs": 3}
    first, again = (server.post("/v1/chat/completions", record).json() for _ in range(2))
    texts = [it["message"]["content"] for it in first["choices"]]
    assert texts == [it["message"]["content"] for it in again["choices"]]
    assert first["choices"][0]["seed"] + 1 == first["choices"][1]["seed"]
    content = first["choices"][0]["logprobs"]["content"]
    assert len(content) == 6 or first["choices"][0]["finish_reason"] == "stop"
    for token in content:
        assert len(token["top_logprobs"]) == 3
        assert np.exp([it["logprob"] for it in token["top_logprobs"]]).sum() <= 1 + 1e-6


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"prompt": 3}, "prompt must be"),
    ({"prompt": []}, "prompt must be"),
    ({"prompt": ""}, "empty"),
    ({"prompt": [10**9]}, "token"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": "9"}, "max_tokens"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "n": 10**6}, "n must be"),
    ({"prompt": "a", "stop": {"a": 1}}, "stop"),
    ({"prompt": "a", "logprobs": 99}, "logprobs"),
    ({"prompt": "a", "logit_bias": {"1": 2}}, "logit_bias is not offered"),
    ({"prompt": "a", "echo": True}, "echo is not offered"),
    ({"prompt": "a", "best_off": 1}, "no field"),
    ({"prompt": "a", "model": 7}, "model"),
    ({"prompt": "a", "stream_options": {}}, "stream_options"),
    ({"prompt": "play " * 500}, "too long"),
    ({"prompt": "a \ud800"}, ""),
]


@pytest.mark.parametrize(("record", "says"), HOSTILE)
def test_a_hostile_body_is_refused_in_one_line(server: Served, record: dict[str, Any], says: str) -> None:
    body = json.dumps(record).encode()
    reply = httpx.post(server.url + "/v1/completions", content=body, timeout=30)
    assert 400 <= reply.status_code < 500, reply.text
    error = reply.json()["error"]
    assert says in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"]
    assert str(server.engine.session.bundle.folder) not in reply.text


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages must be"),
        ([{"role": "tool", "content": "a"}], "message 0"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "message 0"),
        ([{"role": "user", "content": [{"type": "text", "text": {"a": 1}}]}], "message 0"),
    ],
)
def test_a_chat_that_is_none_is_refused(server: Served, messages: Any, says: str) -> None:
    reply = server.post("/v1/chat/completions", {"messages": messages})
    assert reply.status_code == 400 and says in reply.json()["error"]["message"]


def test_models_and_who_is_not_there(server: Served) -> None:
    assert [it["id"] for it in server.get("/v1/models").json()["data"]] == ["text"]
    assert server.get("/v1/models/text:one").json()["id"] == "text:one"
    unknown = server.get("/v1/models/text:nobody")
    asked = server.post("/v1/completions", {"model": "text:nobody", "prompt": "a"})
    assert unknown.status_code == asked.status_code == 404
    assert unknown.json() == asked.json() and asked.json()["error"]["code"] == "unknown_customer"
    assert server.post("/v1/completions", {"model": "gpt", "prompt": "a"}).json()["error"]["code"] == "not_found"


def test_other_interfaces_say_where_to_ask(server: Served) -> None:
    inputs = [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}]
    for path, record in (
        ("/v1/classify", {"texts": ["a"]}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v2/models/text/infer", {"inputs": inputs}),
    ):
        reply = server.post(path, record)
        assert reply.status_code == 400 and "/v1/completions" in reply.json()["error"], path
    for path in ("/v2/models/text", "/v2/models/text/config", "/v2/models/text/stats", "/v2/models/text/ready"):
        assert server.get(path).status_code == 200, path
    assert server.post("/v2/repository/index", {}).json()[0]["state"] == "READY"
    assert server.get("/live.json").status_code == 200
    text = server.get("/metrics").text
    for name in ("qrlora_first_token_seconds_count", "qrlora_prompt_tokens_total", "qrlora_answer_tokens_total"):
        assert f'{name}{{model="text"}}' in text


def test_keys_say_whose_text_may_be_asked(written: Written, tmp_path: Path) -> None:
    made, _, key = with_key(empty_keys(), ["one"], [])
    write_keys(made, keys := tmp_path / "keys.json")
    with served(written, keys=keys) as server:
        bearer = {"authorization": f"Bearer {key}"}
        record = {"model": "text:one", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": NEW}
        found = server.post("/v1/completions", record, **bearer).json()
        assert said(found) == written.greedy(PROMPTS[0], "one", NEW)
        refused = server.post("/v1/completions", record | {"model": "text:two"}, **bearer)
        unknown = server.post("/v1/completions", record | {"model": "text:nobody"}, **bearer)
        assert refused.status_code == 404 and refused.json() == unknown.json()
        assert server.get("/v1/models/text:two", **bearer).status_code == 404
        without = server.post("/v1/completions", record)
        assert without.status_code == 401 and without.json()["error"]["type"] == "authentication_error"


def test_what_is_over_the_bound_may_come_again(written: Written) -> None:
    with served(written, limits=Limits(max_queue_rows=4, customer_share=1.0), answers=1) as server:
        server.slow_down()
        long = {"prompt": "play some music", "max_tokens": 100, "temperature": 0, "n": 4}
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(server.post, "/v1/completions", long)
            wait_for(lambda: server.engine.written().running == 1)
            refused = server.post("/v1/completions", {"prompt": "a"})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert first.result().status_code == 200
        # Where there is no room a request is refused before it is read.
        assert server.post("/v1/completions", long | {"n": 5}).status_code == 413
        late = server.post("/v1/completions", long, **{"x-request-timeout-ms": "1"})
        assert late.status_code == 504 and late.json()["error"]["type"] == "server_error"
        wait_for(lambda: not server.engine.written().running)


def test_who_asks_for_much_keeps_nobody_waiting(written: Written) -> None:
    with served(written, answers=1) as server, ThreadPoolExecutor(2) as pool:
        server.slow_down()
        many = {"model": "text:one", "prompt": "a", "max_tokens": 60, "temperature": 0, "n": 12, "stream": True}
        ended: list[str] = []

        def ask(record: dict[str, Any]) -> None:
            for _ in server.events("/v1/completions", record):
                pass
            ended.append(record["model"])

        first = pool.submit(ask, many)
        wait_for(lambda: server.engine.written().running == 1)
        second = pool.submit(ask, many | {"model": "text:two", "n": 1})
        first.result(), second.result()
        assert ended == ["text:two", "text:one"]


def test_a_server_that_ends_finishes_what_was_begun(written: Written) -> None:
    with served(written) as server:
        server.slow_down()
        record = {"model": name_of("one"), "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 100, "stream": True}
        events = server.events("/v1/completions", record)
        first = next(events)
        stopping = threading.Thread(target=server.running.stop)
        stopping.start()
        texts = [it["choices"][0]["text"] for it in (first, *list(events)[:-1])]
        stopping.join()
        assert "".join(texts) == alone(written, PROMPTS[0], "one", 100)
        with pytest.raises(httpx.ConnectError):
            server.post("/v1/completions", record)


def test_what_is_not_written_when_a_server_closes_is_refused(written: Written) -> None:
    with served(written, answers=1) as server, ThreadPoolExecutor(1) as pool:
        server.slow_down()
        record = {"prompt": "play some music", "temperature": 0, "max_tokens": 100, "n": 40}
        asked = pool.submit(server.post, "/v1/completions", record)
        wait_for(lambda: server.engine.written().running == 1)
        assert not server.engine.drain(0.0)
        late = server.post("/v1/completions", record)
        assert late.status_code == 503 and late.json()["error"]["type"] == "server_error"
        server.engine.close()
        assert asked.result().status_code == 503


def test_a_quota_counts_answers(written: Written) -> None:
    with GenerationSession.open(written.bundle, written.customers, threads=1) as session:
        engine = TextEngine(session, quotas=Quotas({"one": 2.0}))
        engine.release(engine.admit(Load(2, 20, 2), ["one"] * 2))
        with pytest.raises(QuotaError, match="used up"):
            engine.admit(Load(1, 10, 1), ["one"])
        ticket = engine.admit(Load(1, 10, 1), [None])
        with pytest.raises(MalformedInputError, match="/v1/completions"):
            engine.submit(ticket, [])
        assert engine.drain(1.0)
        engine.close()


def test_what_a_decoder_does_not_do_is_refused_before_it_is_opened(written: Written) -> None:
    places = [ModelPlaces("text", written.bundle)]
    with pytest.raises(InputError, match=r"writes text, in batches of its own; leave out buckets$"):
        OpenModel(places[0], RunOptions(buckets=Buckets((1,), (32,))))


def test_options_that_mean_nothing_for_a_decoder_are_refused(written: Written, tmp_path: Path) -> None:
    ran = run_here("serve", written.bundle, "--check", "--merged-cache-mib", "8", cwd=tmp_path)
    assert ran.code == 2 and "--merged-cache-mib does nothing for" in ran.err and ran.err.count("\n") == 1
