"""Compression, limits on bodies, ids of requests, and what a reply's headers are."""

import asyncio
import gzip
import zlib
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError, MalformedInputError
from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.encodings import chosen, deflated, inflated
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.http.guard import Guard
from qrlora_deploy.serving.http.limits import HttpLimits
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.refusals import TooLargeError
from qrlora_deploy.serving.served import Models
from tests.tiny import SENTENCES

pytest.importorskip("httpx", reason="needs the extra client")
from starlette.testclient import TestClient

ASK = {"texts": list(SENTENCES), "customer": "acme"}
LIMIT = 20_000

COMPRESS = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
}


@pytest.fixture
def front(models: Models) -> Front:
    front = Front(models)
    front.life.begin()
    return front


@pytest.fixture
def client(front: Front) -> Iterator[TestClient]:
    with TestClient(make_app(front, HttpLimits(max_body_bytes=LIMIT)), headers={"accept-encoding": ""}) as client:
        yield client


def raw_deflate(body: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(body) + stream.flush()


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]))
def test_what_is_compressed_comes_back(body: bytes, encoding: str) -> None:
    assert inflated(deflated(body, encoding), encoding, 300) == body
    assert inflated(COMPRESS[encoding](body), encoding, 300) == body
    assert (gzip.decompress if encoding == "gzip" else zlib.decompress)(deflated(body, encoding)) == body


@given(st.binary(max_size=60), st.sampled_from(["gzip", "deflate"]), st.binary(max_size=5))
def test_what_is_damaged_is_refused_or_read(body: bytes, encoding: str, more: bytes) -> None:
    whole = COMPRESS[encoding](body)
    for damaged in (whole[:-1], whole[: len(whole) // 2], body, whole + more):
        try:
            assert len(inflated(damaged, encoding, 100)) <= 100
        except (MalformedInputError, TooLargeError) as error:
            assert "\n" not in str(error)


def test_both_meanings_of_deflate_and_members_of_gzip() -> None:
    assert inflated(raw_deflate(b"hello"), "deflate", 5) == b"hello"
    assert inflated(gzip.compress(b"hel") + gzip.compress(b"lo"), "gzip", 5) == b"hello"
    with pytest.raises(MalformedInputError, match="members"):
        inflated(gzip.compress(b"") * 300, "gzip", 5)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_makes_no_more_than_it_may(encoding: str, client: TestClient) -> None:
    bomb = COMPRESS[encoding](b" " * 10_000_000)
    assert len(bomb) < LIMIT
    with pytest.raises(TooLargeError):
        inflated(bomb, encoding, LIMIT)
    reply = client.post("/v1/classify", content=bomb, headers={"content-encoding": encoding})
    assert reply.status_code == 413 and reply.headers["connection"] == "close"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_requests_and_replies_are_compressed(encoding: str, client: TestClient) -> None:
    plain = client.post("/v1/classify", json=ASK)
    assert "content-encoding" not in plain.headers
    body = COMPRESS[encoding](orjson.dumps(ASK))
    headers = {"content-encoding": encoding, "accept-encoding": encoding}
    reply = client.post("/v1/classify", content=body, headers=headers)
    assert reply.headers["content-encoding"] == encoding and reply.headers["vary"] == "accept-encoding"
    assert int(reply.headers["content-length"]) < int(plain.headers["content-length"])
    assert reply.json() == plain.json()
    long = client.post("/v1/classify", json=ASK | {"texts": ["a"] * 500}, headers={"accept-encoding": encoding})
    assert long.headers["content-encoding"] == encoding and len(long.json()["answers"]) == 500
    # Not worth it.
    assert "content-encoding" not in client.get("/v2", headers=headers).headers


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [("", ""), ("gzip", "gzip"), ("deflate", "deflate"), ("br, deflate;q=0.5, gzip;q=0", "deflate"), ("GZIP", "gzip")],
)
def test_what_a_client_takes(accepted: str, expected: str) -> None:
    assert chosen(accepted) == expected


def test_encodings_that_are_not_taken(client: TestClient) -> None:
    for headers, body in (({"content-encoding": "br"}, b"x"), ({"content-encoding": "gzip"}, b"no gzip")):
        reply = client.post("/v1/classify", content=body, headers=headers)
        assert reply.status_code == 400 and "gzip" in reply.json()["error"]


def test_a_body_that_is_too_long_is_not_read_to_its_end(front: Front, client: TestClient) -> None:
    for headers, content in (({}, b" " * (LIMIT + 1)), ({"content-length": "9" * 30}, b"{}")):
        reply = client.post("/v1/classify", content=content, headers=headers)
        assert reply.status_code == 413 and str(LIMIT) in reply.json()["error"]
    pieces = 0

    async def endless() -> Any:
        nonlocal pieces
        pieces += 1
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    assert call(make_app(front, HttpLimits(max_body_bytes=LIMIT)), endless)[0]["status"] == 413
    assert pieces == LIMIT // 1000 + 1


def test_ids_are_echoed_or_made(client: TestClient) -> None:
    assert client.get("/v2", headers={"x-request-id": "abc-7"}).headers["x-request-id"] == "abc-7"
    made = [client.get("/v2", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a" * 200, "a b")]
    assert all(len(name) == 16 for name in made) and len(set(made)) == 3


def test_the_deadline_header(client: TestClient) -> None:
    assert client.post("/v1/classify", json=ASK, headers={"x-request-timeout-ms": "60000"}).status_code == 200
    assert client.post("/v1/classify", json=ASK, headers={"x-request-timeout-ms": "0"}).status_code == 504
    for bad in ("soon", "-1", "1.5", "9" * 40):
        reply = client.post("/v1/classify", json=ASK, headers={"x-request-timeout-ms": bad})
        assert reply.status_code == 400 and "x-request-timeout-ms" in reply.json()["error"]


def test_while_a_server_drains_connections_end_with_the_reply(front: Front, client: TestClient) -> None:
    assert "connection" not in client.get("/v2").headers
    front.life.drain()
    assert client.get("/v2").headers["connection"] == "close"


def call(guard: Any, receive: Any) -> list[dict[str, Any]]:
    """The messages of a reply to a request whose body comes by `receive`."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/classify", "query_string": b"", "headers": []}
    asyncio.run(guard(scope, receive, send))
    return sent


def test_a_body_that_does_not_come_in_time(front: Front) -> None:
    async def nothing() -> Any:
        await asyncio.sleep(60)

    sent = call(make_app(front, HttpLimits(body_s=0.05)), nothing)
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]


def test_all_bodies_together_are_bounded_and_counted_back(front: Front) -> None:
    async def body() -> Any:
        return {"type": "http.request", "body": orjson.dumps(ASK), "more_body": False}

    guard = make_app(front, HttpLimits(max_bodies_bytes=len(orjson.dumps(ASK))))
    assert isinstance(guard, Guard)
    for _ in range(3):
        assert call(guard, body)[0]["status"] == 200
    guard.hold(1)
    sent = call(guard, body)
    assert sent[0]["status"] == 429 and any(name == b"retry-after" for name, _ in sent[0]["headers"])


def test_a_client_that_has_gone_is_no_failure(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    async def gone() -> Any:
        return {"type": "http.disconnect"}

    assert call(make_app(front), gone)[0]["status"] == 408  # type: ignore[arg-type]
    assert caplog.text == ""


def test_limits_are_positive() -> None:
    with pytest.raises(InputError, match="max_connections must be more than 0"):
        HttpLimits(max_connections=0)


def test_what_is_no_request_goes_through() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Guard(app, Life())({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
