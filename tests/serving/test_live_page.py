"""The page for people and its numbers, over HTTP and gRPC: who may see them, and what they never tell."""

import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest

from qrlora_deploy.serving import live
from qrlora_deploy.serving.access import Access
from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.http.live_page import FILES, NUMBERS
from qrlora_deploy.serving.live.window import Window
from qrlora_deploy.serving.refusals import UnauthenticatedError
from qrlora_deploy.serving.served import Models, ServedModel
from tests.tiny import SENTENCES

pytest.importorskip("httpx", reason="needs the extra client")
from starlette.testclient import TestClient

ASK = {"texts": list(SENTENCES), "customer": "acme"}


class Keys:
    """One key, of a customer without any other right."""

    @staticmethod
    def access(key: str | None) -> Access:
        if key != "secret":
            raise UnauthenticatedError("give a key that is known")
        return Access("id", (frozenset({"acme"}),))


@pytest.fixture
def front(models: Models) -> Front:
    front = Front(models)
    front.life.begin()
    return front


@pytest.fixture
def client(front: Front) -> Iterator[TestClient]:
    with TestClient(make_app(front)) as client:
        yield client


def numbers(front: Front, client: TestClient) -> Any:
    """The numbers after a step; no test waits for the clock."""
    assert isinstance(front.live_window, Window)
    later_s = front.live_window._clock() + 2
    front.live_window._clock = lambda: later_s
    return client.get(NUMBERS).json()


def test_requests_are_told_as_they_ended(front: Front, client: TestClient, model: ServedModel) -> None:
    client.get(NUMBERS)
    assert client.post("/v1/classify", json=ASK).status_code == 200
    assert client.post("/v1/classify", json={"texts": ["a"], "customer": "nobody"}).status_code == 404
    assert client.post("/v2/models/tiny/infer", json={}).status_code == 400
    model.engine.max_rows = 0  # type: ignore[attr-defined]
    assert client.post("/v1/classify", json=ASK).status_code == 429
    # Whoever only looks is no load.
    assert client.get("/v2/models/tiny").status_code == client.get("/v2/health/ready").status_code == 200
    found = numbers(front, client)
    assert found["refused"] == {"malformed_input": 1, "overloaded": 1, "unknown_customer": 1}
    span_s = found["seconds"]
    assert found["now"]["requests_s"] * span_s == pytest.approx(1, rel=0.01)
    assert found["now"]["rows_s"] * span_s == pytest.approx(len(SENTENCES), rel=0.01)
    assert found["now"]["p50_ms"] == found["now"]["p99_ms"] > 0
    assert (found["state"], [model["name"] for model in found["models"]]) == ("ready", ["tiny"])
    assert found["models"][0]["ready"] is True and found["uptime_s"] > 0


def test_no_customer_is_named(front: Front, client: TestClient) -> None:
    for name in ("acme", "beta", "nobody-of-that-name"):
        client.post("/v1/classify", json=ASK | {"customer": name})
    found = str(numbers(front, client))
    assert not any(name in found for name in ("acme", "beta", "nobody", SENTENCES[0]))


def test_the_state_follows_the_life_of_the_server(models: Models) -> None:
    front = Front(models)
    with TestClient(make_app(front)) as client:
        assert client.get(NUMBERS).json()["state"] == "starting"
        front.life.begin()
        assert client.get(NUMBERS).json()["state"] == "ready"
        front.life.drain()
        record = client.get(NUMBERS).json()
        assert record["state"] == "draining" and record["models"][0]["ready"] is False


def test_with_keys_the_page_is_open_and_its_numbers_need_one_as_metrics_do(models: Models) -> None:
    front = Front(models, keys=Keys())
    front.life.begin()
    with TestClient(make_app(front)) as client:
        assert {client.get(path).status_code for path in FILES} == {200}
        for headers in ({}, {"authorization": "Bearer wrong"}):
            reply = client.get(NUMBERS, headers=headers)
            assert reply.status_code == 401 and set(reply.json()) == {"error"}
        assert client.get(NUMBERS, headers={"authorization": "Bearer secret"}).status_code == 200


def test_the_browser_is_told_to_run_and_to_fetch_nothing_else(client: TestClient) -> None:
    for path, (name, kind) in FILES.items():
        reply = client.get(path)
        assert reply.content == (resources.files(live) / name).read_bytes() and reply.headers["content-type"] == kind
        policy = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert client.get(NUMBERS).headers["cache-control"] == "no-store"


def test_the_files_hold_no_address_and_nothing_inline() -> None:
    for name, _ in FILES.values():
        text = (resources.files(live) / name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]|@import|url\(|\bon[a-z]+=|style=|<style|eval\(|innerHTML", text), name
    page = (resources.files(live) / "page.html").read_text("utf-8")
    assert re.findall(r"<script[^>]*>[^<]", page) == []
    assert {*re.findall(r'(?:href|src)="([^"]+)"', page)} == set(FILES) - {"/"}
