"""The client, keys and metrics against the whole application on a real port: answers are those of the predictor."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httpx", reason="needs the extra client")

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from qrlora_deploy.client import BadRequestError, Client, NotFoundError, ServerError, UnauthenticatedError
from qrlora_deploy.runtime import Predictor
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.access import Keys
from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.keys_file import empty_keys, with_key, write_keys
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.served import Models
from tests.tiny import SENTENCES
from tests.tolerances import FP32_ONNX

CUSTOMERS = ["acme", "beta", None, "gamma", "delta", "acme"]


@contextmanager
def listening(front: Front) -> Iterator[str]:
    """A server in a thread; the address."""
    server = uvicorn.Server(uvicorn.Config(make_app(front), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Keys, dict[str, str]]:
    """A key of acme, whose customer `gone` has no file, and one of everyone."""
    stored, _, acme = with_key(empty_keys(), ["acme", "gone"], [])
    stored, _, everyone = with_key(stored, ["*"], [])
    write_keys(stored, tmp_path / "keys.json")
    return Keys.open(tmp_path / "keys.json"), {"acme": acme, "everyone": everyone}


@pytest.fixture
def front(models: Models, keys: tuple[Keys, dict[str, str]]) -> Front:
    front = Front(models, keys=keys[0], metrics=Metrics(models))
    front.life.begin()
    return front


def test_answers_are_those_of_the_predictor(
    front: Front, keys: tuple[Keys, dict[str, str]], session: SwitchableSession
) -> None:
    expected = Predictor(session).predict(list(SENTENCES), customers=CUSTOMERS)
    texts = {"text": list(SENTENCES), "customer": [name or "" for name in CUSTOMERS]}
    with listening(front) as url, Client(url, keys[1]["everyone"]) as client:
        assert client.ready()
        answers = client.classify(SENTENCES, customers=CUSTOMERS)
        inferences = [client.infer("tiny", texts, binary=binary, request_id="r-1") for binary in (True, False)]
        one = client.infer("tiny", {"text": list(SENTENCES)}, "acme", outputs=["label", "logits"])
    assert [answer.label for answer in answers] == [answer.label for answer in expected]
    np.testing.assert_allclose([answer.score for answer in answers], [answer.score for answer in expected], **FP32_ONNX)
    assert [answer.customer for answer in answers] == CUSTOMERS
    assert len({answer.customer_digest for answer in answers}) == 5
    for inference in inferences:
        assert inference.id == "r-1" and inference.model == "tiny"
        assert inference.outputs["label"].tolist() == [answer.label for answer in expected]
        best = inference.outputs["scores"].max(axis=1)
        np.testing.assert_allclose(best, [answer.score for answer in expected], **FP32_ONNX)
    np.testing.assert_array_equal(inferences[0].outputs["logits"], inferences[1].outputs["logits"])
    assert set(one.outputs) == {"label", "logits"} and one.parameters["customer_digest"]


def test_a_key_opens_its_customers_and_tells_nothing_of_others(front: Front, keys: tuple[Keys, dict[str, str]]) -> None:
    told = []
    with listening(front) as url:
        for key in (None, "qd_000000000000_x", keys[1]["acme"] + "x"):
            with Client(url, key) as client, pytest.raises(UnauthenticatedError):
                client.classify(["a"], "acme")
        with Client(url, keys[1]["acme"]) as client:
            assert client.classify(["a"], "acme")[0].customer == "acme"
            for customers in (["beta"], ["never-heard-of"], ["gone"], ["acme", "beta"]):
                with pytest.raises(NotFoundError) as caught:
                    client.classify(["a"] * len(customers), customers=customers)
                told.append(str(caught.value))
            with pytest.raises(BadRequestError):
                client.infer("tiny", {"other": ["a"]})
            with pytest.raises(ServerError):
                client.infer("none", {"text": ["a"]})
    assert len(set(told)) == 1


def test_a_scrape_counts_what_was_asked(front: Front, keys: tuple[Keys, dict[str, str]]) -> None:
    with listening(front) as url:
        with Client(url, keys[1]["acme"]) as client:
            client.classify(SENTENCES, "acme")
            client.classify(["a"])
            with pytest.raises(NotFoundError):
                client.classify(["a"], "beta")
        text = httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {keys[1]['acme']}"}).text
    found = {
        (it.name, it.labels.get("code")): it.value
        for family in text_string_to_metric_families(text)
        for it in family.samples
        if it.labels.get("route") == "/v1/classify" or it.labels.get("model") == "tiny"
    }
    rows = len(SENTENCES) + 1
    assert found["qrlora_requests_total", "200"] == 2 and found["qrlora_requests_total", "404"] == 1
    assert found["qrlora_request_rows_total", None] == found["qrlora_rows_total", None] == rows
    assert "acme" not in text
