"""The client: what it sends, what it makes of answers, when it tries again, and that it ends in time."""

import gzip
import json
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs the extra client")

import anyio
import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_deploy.client import (
    Answer,
    AsyncClient,
    BadAnswerError,
    BadRequestError,
    Client,
    DeadlineError,
    ForbiddenError,
    NotFoundError,
    OverloadedError,
    Retries,
    ServerError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
    UnreachableError,
)
from qrlora_deploy.client.calls import retry_after
from qrlora_deploy.errors import InputError, MalformedInputError
from tests.client.scripted import Reply, Scripted, scripted

QUICK = Retries(times=4, first_s=0.001, most_s=0.002)
KEY = "qd_3f9a01c2b7d4_secret"
ANSWER = Answer("banking", 0.75, ("banking",), "acme", "d")

Ask = Callable[..., Any]


def ask_and_wait(url: str, method: str, *arguments: Any, client: dict[str, Any], **more: Any) -> Any:
    with Client(url, **client) as it:
        return getattr(it, method)(*arguments, **more)


def ask_in_a_loop(url: str, method: str, *arguments: Any, client: dict[str, Any], **more: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, **client) as it:
            return await getattr(it, method)(*arguments, **more)

    return anyio.run(ask)


@pytest.fixture(params=[ask_and_wait, ask_in_a_loop], ids=["Client", "AsyncClient"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Asks a server once by either client."""

    def call(script: Scripted, method: str = "classify", *arguments: Any, **more: Any) -> Any:
        client = {"key": KEY, "retries": QUICK, "deadline_s": 20.0} | more.pop("client", {})
        if method == "classify" and not arguments:
            arguments = (["my card was stolen"], "acme")
        return request.param(script.url, method, *arguments, client=client, **more)

    return call


def test_texts_are_sent_and_answers_are_read(ask: Ask) -> None:
    with scripted(Reply()) as script:
        assert ask(script, "classify", ["\u00e9"], "acme", pairs=["b"], model="tiny") == [ANSWER]
        assert ask(script, "classify", ["a"], customers=["acme"]) == [ANSWER]
    first, second = script.asked
    assert first.path == "/v1/classify" and first.headers["authorization"] == f"Bearer {KEY}"
    assert json.loads(first.body) == {
        "texts": ["\u00e9"],
        "customer": "acme",
        "pairs": ["b"],
        "model": "tiny",
    }
    assert json.loads(second.body) == {"texts": ["a"], "customers": ["acme"]}
    assert 10_000 < int(first.headers["x-request-timeout-ms"]) <= 20_000


def test_answers_may_be_compressed(ask: Ask) -> None:
    with scripted(Reply(body=gzip.compress(Reply().body), headers={"content-encoding": "gzip"})) as script:
        assert ask(script) == [ANSWER]
    assert "gzip" in script.asked[0].headers["accept-encoding"]


KINDS = {
    400: BadRequestError,
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: NotFoundError,
    413: TooLargeError,
    422: BadRequestError,
    500: ServerError,
    504: DeadlineError,
}


@pytest.mark.parametrize("status", KINDS)
def test_a_status_is_an_error_of_its_own_and_not_tried_again(ask: Ask, status: int) -> None:
    with scripted(Reply(status, b'{"error": "what is wrong"}', {"x-request-id": "r-7"})) as script:
        with pytest.raises(ServerError, match="what is wrong") as caught:
            ask(script)
        assert type(caught.value) is KINDS[status]
        assert (caught.value.status, caught.value.request_id) == (status, "r-7")
        assert len(script.asked) == 1


def test_an_error_without_the_body_of_one_says_its_status(ask: Ask) -> None:
    with scripted(Reply(500, b"<html>")) as script, pytest.raises(ServerError, match="500"):
        ask(script)


@pytest.mark.parametrize("reply", [Reply(429, b"{}"), Reply(503, b"{}"), Reply(502, b"{}"), Reply(0)])
def test_what_may_end_otherwise_is_tried_again(ask: Ask, reply: Reply) -> None:
    with scripted(reply, reply, Reply()) as script:
        assert ask(script) == [ANSWER]
        assert len(script.asked) == 3
        assert len({asked.body for asked in script.asked}) == 1
        times = [int(asked.headers["x-request-timeout-ms"]) for asked in script.asked]
        assert times[0] >= times[1] >= times[2]


@pytest.mark.parametrize(
    ("reply", "kind"), [(Reply(429), OverloadedError), (Reply(503), UnavailableError), (Reply(0), UnreachableError)]
)
def test_tries_end_with_the_last_error(ask: Ask, reply: Reply, kind: type[ServerError]) -> None:
    with scripted(reply) as script:
        with pytest.raises(kind):
            ask(script)
        assert len(script.asked) == 1 + QUICK.times
        with pytest.raises(kind):
            ask(script, client={"retries": Retries(times=0)})
        assert len(script.asked) == 2 + QUICK.times


def test_nobody_listening_is_an_error(ask: Ask) -> None:
    with scripted(Reply()) as script:
        pass
    with pytest.raises(UnreachableError, match="127.0.0.1"):
        ask(script)
    assert ask(script, "ready") is False


def test_the_server_says_when_to_come_again(ask: Ask) -> None:
    with scripted(Reply(429, b"{}", {"retry-after": "1"}), Reply()) as script:
        assert ask(script) == [ANSWER]
    assert script.asked[1].time_s - script.asked[0].time_s >= 1.0


def test_no_try_comes_after_the_deadline(ask: Ask) -> None:
    with scripted(Reply(429, b'{"error": "full"}', {"retry-after": "60"})) as script:
        with pytest.raises(OverloadedError, match="full") as caught:
            ask(script, deadline_s=5.0)
        assert caught.value.retry_after_s == 60.0 and len(script.asked) == 1


@pytest.mark.parametrize("reply", [Reply(pause_s=3.0), Reply(piece=1, pause_s=0.15)], ids=["late", "drop by drop"])
def test_an_answer_that_does_not_come_in_time_is_given_up(ask: Ask, reply: Reply) -> None:
    with scripted(reply) as script:
        with pytest.raises(DeadlineError, match="deadline_s"):
            ask(script, deadline_s=0.5)
        assert len(script.asked) == 1


WRONG = {
    "html": b"<html>",
    "a list": b"[]",
    "nothing": b"{}",
    "no list": b'{"answers": 3}',
    "no label": b'{"answers": [{"score": 1}]}',
    "a number as label": b'{"answers": [{"label": 1, "score": 1}]}',
    "a text as score": b'{"answers": [{"label": "a", "score": "x"}]}',
    "a score that no float holds": b'{"answers": [{"label": "a", "score": 1%s}]}' % (b"0" * 400),
    "fewer answers than texts": b'{"answers": []}',
    "more answers than texts": b'{"answers": [{"label": "a", "score": 1}, {"label": "b", "score": 1}]}',
    "deep": b"[" * 100_000,
    "cut": Reply().body[:-9],
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG)
def test_an_answer_of_another_form_is_refused_in_one_line(ask: Ask, body: bytes) -> None:
    with scripted(Reply(body=body)) as script, pytest.raises(BadAnswerError, match="cannot be read"):
        ask(script)


def test_an_answer_that_is_not_what_it_says_is_refused(ask: Ask) -> None:
    with (
        scripted(Reply(body=b"no gzip", headers={"content-encoding": "gzip"})) as script,
        pytest.raises(BadAnswerError),
    ):
        ask(script)


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=20), st.integers(-5, 10**400).map(str), st.floats().map(str)))
def test_whatever_retry_after_says_no_wait_is_negative_or_endless(text: str) -> None:
    found = retry_after(text)
    assert found is None or 0 <= found < float("inf")


def test_retry_after_may_be_a_time() -> None:
    assert retry_after(None) is None and retry_after("soon") is None
    assert retry_after("7") == 7.0
    later = retry_after(formatdate(time.time() + 100, usegmt=True))
    assert later is not None and 90 < later <= 100
    assert retry_after(formatdate(0, usegmt=True)) == 0.0


def test_waits_grow_are_spread_and_never_before_what_is_asked() -> None:
    retries = Retries(times=10, first_s=1.0, most_s=8.0)
    full = OverloadedError("full")
    for tried, bound in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (10, 8.0)):
        waits = [retries.wait_s(tried, full) for _ in range(200)]
        assert all(wait is not None and 0 <= wait <= bound for wait in waits)
        assert len(set(waits)) > 100
        assert max(wait for wait in waits if wait is not None) > bound / 2
    asked = [retries.wait_s(1, OverloadedError("full", retry_after_s=3.0)) for _ in range(50)]
    assert all(wait is not None and 3.0 <= wait <= 4.0 for wait in asked)
    assert retries.wait_s(11, full) is None and retries.wait_s(1, NotFoundError("gone")) is None


def test_what_cannot_be_sent_is_refused_here() -> None:
    with scripted(Reply()) as script, Client(script.url) as client:
        for texts in ("one text", ["\ud800"], [b"bytes"], [object()]):
            with pytest.raises(MalformedInputError):
                client.classify(texts)  # type: ignore[arg-type]
        for inputs in ({"x": [["a"], "b"]}, {"x": [1, "a"]}, {"x": [1 + 2j]}, {"x": ["\ud800"]}):
            with pytest.raises(MalformedInputError):
                client.infer("tiny", inputs)
        with pytest.raises(MalformedInputError):
            client.infer("tiny", {"x": [float("nan")]}, binary=False)
    assert script.asked == []


@pytest.mark.parametrize("url", ["", "localhost:8080", "ftp://host", "http://", "http://host/?a=b"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="https://host:8080"):
        Client(url)


def test_a_key_is_shown_nowhere_and_cannot_smuggle_a_header() -> None:
    with Client("http://localhost:1", key=KEY) as client:
        assert KEY not in repr(client) + repr(client._settings)
    for key in ("a\r\nX-Admin: 1", "", " ", "\u00e9"):
        with pytest.raises(InputError, match="key") as caught:
            Client("http://localhost:1", key=key)
        assert "X-Admin" not in str(caught.value)


def test_a_redirect_is_not_followed_with_the_key(ask: Ask) -> None:
    with scripted(Reply()) as other, scripted(Reply(307, b"{}", {"location": other.url})) as script:
        with pytest.raises(ServerError, match="307"):
            ask(script)
        assert other.asked == []


def test_a_client_of_the_callers_is_not_closed() -> None:
    with scripted(Reply()) as script, httpx.Client() as http:
        with Client(script.url + "/", http=http) as client:
            assert client.classify(["a"]) == [ANSWER]
        assert not http.is_closed
        assert Client(script.url, http=http).ready()
