"""Inference over HTTP, held against a `Predictor` on the same bundle and customers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.prediction.predictor import Prediction, Predictor
from qrlora_deploy.runtime.prediction.tokenizing import TextEncoder
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.outputs import PADDING
from qrlora_deploy.serving.served import Models, ServedModel
from tests.tiny import LABELS, SENTENCES
from tests.tolerances import FP32_ONNX

pytest.importorskip("httpx", reason="needs the extra client")
from starlette.testclient import TestClient

OWNERS = ["acme", None, "beta", "gamma", "delta", "acme"]
TEXTS = list(SENTENCES)


@pytest.fixture
def client(models: Models) -> Iterator[TestClient]:
    front = Front(models)
    front.life.begin()
    with TestClient(make_app(front)) as client:
        yield client


@pytest.fixture
def expected(session: SwitchableSession) -> list[Prediction]:
    """What the predictor says to each text, alone."""
    predictor = Predictor(session)
    return [predictor.predict([text], customers=[name])[0] for text, name in zip(TEXTS, OWNERS, strict=True)]


def texts_input(texts: list[str], name: str = "text") -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [len(texts)], "data": texts}


def infer(client: TestClient, **record: Any) -> Any:
    reply = client.post("/v2/models/tiny/infer", json=record)
    assert reply.status_code == 200, reply.text
    return reply.json()


def outputs_of(reply: Any) -> dict[str, np.ndarray]:
    return {
        output["name"]: np.array(output["data"], dtype=object if output["datatype"] == "BYTES" else np.float32).reshape(
            output["shape"]
        )
        for output in reply["outputs"]
    }


def check_rows(found: dict[str, np.ndarray], expected: list[Prediction], session: SwitchableSession) -> None:
    labels = {"gamma": ("no", "yes"), "delta": tuple("abcdef")}
    for row, (owner, wanted) in enumerate(zip(OWNERS, expected, strict=True)):
        own = labels.get(owner or "", LABELS)
        assert list(found["labels"][row]) == [*own, *[""] * (6 - len(own))]
        np.testing.assert_allclose(found["logits"][row, : len(own)], wanted.logits, **FP32_ONNX)
        assert (found["logits"][row, len(own) :] == PADDING["FP32"]).all()
        odds = np.exp(np.array(wanted.logits) - max(wanted.logits))
        np.testing.assert_allclose(found["scores"][row, : len(own)], odds / odds.sum(), **FP32_ONNX)
        assert (found["scores"][row, len(own) :] == 0).all()
        assert found["label"][row] == wanted.label == own[int(found["logits"][row].argmax())]


def test_each_row_is_answered_for_its_customer(
    client: TestClient,
    expected: list[Prediction],
    session: SwitchableSession,
    customers: dict[str, Coefficients],
    model: ServedModel,
) -> None:
    reply = infer(
        client,
        id="7",
        inputs=[texts_input(TEXTS), texts_input([name or "" for name in OWNERS], "customer")],
    )
    assert (reply["model_name"], reply["model_version"], reply["id"]) == ("tiny", "1", "7")
    assert reply["parameters"] == {"base_digest": model.bundle.manifest.base_digest}
    found = outputs_of(reply)
    check_rows(found, expected, session)
    assert list(found["digest"]) == [customers[name].digest if name else "" for name in OWNERS]


def test_one_customer_for_all_rows_by_a_parameter(client: TestClient, customers: dict[str, Coefficients]) -> None:
    reply = infer(client, parameters={"customer": "beta"}, inputs=[texts_input(TEXTS)], outputs=[{"name": "logits"}])
    alone = infer(client, inputs=[texts_input(TEXTS), texts_input(["beta"] * 6, "customer")])
    base = infer(client, inputs=[texts_input(TEXTS)])
    assert [output["name"] for output in reply["outputs"]] == ["logits"]
    assert reply["parameters"]["customer_digest"] == customers["beta"].digest
    np.testing.assert_allclose(outputs_of(reply)["logits"], outputs_of(alone)["logits"], **FP32_ONNX)
    assert np.abs(outputs_of(reply)["logits"] - outputs_of(base)["logits"]).max() > 0.1


def test_token_ids_give_what_their_texts_give(
    client: TestClient, session: SwitchableSession, expected: list[Prediction]
) -> None:
    encoded = TextEncoder(session.bundle).encode(TEXTS)
    inputs = [
        {"name": name, "datatype": "INT64", "shape": list(array.shape), "data": array.tolist()}
        for name, array in encoded.items()
    ]
    found = outputs_of(infer(client, inputs=[*inputs, texts_input([name or "" for name in OWNERS], "customer")]))
    check_rows(found, expected, session)
    # Flat, and without what is all ones or all zeros.
    ids = encoded["input_ids"][:1, : encoded["attention_mask"][0].sum()]
    flat = {"name": "input_ids", "datatype": "INT64", "shape": list(ids.shape), "data": ids.ravel().tolist()}
    logits = outputs_of(infer(client, inputs=[flat], parameters={"customer": "acme"}))["logits"]
    np.testing.assert_allclose(logits[0], expected[0].logits, **FP32_ONNX)


def test_pairs(client: TestClient, session: SwitchableSession) -> None:
    wanted = Predictor(session).predict(TEXTS[:2], TEXTS[2:4], customers=["acme", "beta"])
    inputs = [texts_input(TEXTS[:2]), texts_input(TEXTS[2:4], "text_pair"), texts_input(["acme", "beta"], "customer")]
    logits = outputs_of(infer(client, inputs=inputs))["logits"]
    np.testing.assert_allclose(logits, [answer.logits for answer in wanted], **FP32_ONNX)
    reply = client.post("/v1/classify", json={"texts": TEXTS[:2], "pairs": TEXTS[2:4], "customers": ["acme", "beta"]})
    assert [answer["label"] for answer in reply.json()["answers"]] == [answer.label for answer in wanted]


def test_classify(
    client: TestClient, expected: list[Prediction], customers: dict[str, Coefficients], model: ServedModel
) -> None:
    reply = client.post("/v1/classify", json={"texts": TEXTS, "customers": OWNERS})
    assert reply.status_code == 200 and reply.headers["content-type"] == "application/json"
    record = reply.json()
    assert record["model"] == "tiny" and record["base_digest"] == model.bundle.manifest.base_digest
    for owner, wanted, found in zip(OWNERS, expected, record["answers"], strict=True):
        assert (found["label"], found["labels"], found["customer"]) == (wanted.label, list(wanted.labels), owner)
        assert found["score"] == pytest.approx(wanted.score, rel=1e-4)
        assert found["customer_digest"] == (customers[owner].digest if owner else "")


def test_an_infinite_number_never_leaves_as_null(
    client: TestClient, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        @staticmethod
        def predict(inputs: Any, owners: Any) -> Any:
            return np.array([[0.0, np.nan, np.inf, 1.0]], dtype=np.float32), [LABELS]

    monkeypatch.setattr(model.engine, "session", Broken)
    reply = client.post("/v2/models/tiny/infer", json={"inputs": [texts_input(TEXTS[:1])]})
    assert reply.status_code == 500 and "row 0 of logits is not finite" in reply.json()["error"]
    reply = client.post("/v1/classify", json={"texts": TEXTS[:1]})
    assert reply.status_code == 500 and "text 0 is not finite" in reply.json()["error"]


ONE = texts_input(["hello"])

REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no inputs": ({}, 400, "inputs must be a list"),
    "an unknown input": ({"inputs": [texts_input(["a"], "txt")]}, 400, "there is no input 'txt'"),
    "another number of texts": ({"inputs": [ONE | {"shape": [2]}]}, 400, "not that of 1 elements"),
    "a text that is none": ({"inputs": [ONE | {"data": [1]}]}, 400, "must be a list of texts"),
    "texts in columns": ({"inputs": [ONE | {"shape": [1, 2], "data": ["a", "b"]}]}, 400, "shape [rows]"),
    "a datatype that is not taken": ({"inputs": [ONE | {"datatype": "FP32"}]}, 400, "BYTES or INT64"),
    "a shape that is none": ({"inputs": [ONE | {"shape": [-1]}]}, 400, "whole numbers"),
    "two of one name": ({"inputs": [ONE, ONE]}, 400, "name of its own"),
    "no rows": ({"inputs": [texts_input([])]}, 400, "no texts"),
    "texts and ids": (
        {"inputs": [ONE, {"name": "input_ids", "datatype": "INT64", "shape": [1, 1], "data": [2]}]},
        400,
        "give either",
    ),
    "ids of no token": (
        {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "data": [2, 99999]}]},
        400,
        "where the model has rows",
    ),
    "ids that are no numbers": (
        {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "data": [2, 1.5]}]},
        400,
        "whole numbers of 64 bits",
    ),
    "too many ids": (
        {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [1, 65], "data": [5] * 65}]},
        400,
        "65 tokens, the model takes 64",
    ),
    "nobody's customer": ({"inputs": [ONE], "parameters": {"customer": "nobody"}}, 404, "no customer of that name"),
    "customers by both ways": (
        {"inputs": [ONE, texts_input(["acme"], "customer")], "parameters": {"customer": "acme"}},
        400,
        "use one of them",
    ),
    "fewer customers": (
        {"inputs": [texts_input(["a", "b"]), texts_input(["acme"], "customer")]},
        400,
        "2 rows but 1 customers",
    ),
    "an output that is not there": ({"inputs": [ONE], "outputs": [{"name": "mood"}]}, 400, "choose from logits"),
    "half precision in JSON": (
        {"inputs": [ONE], "outputs": [{"name": "logits", "parameters": {"datatype": "FP16"}}]},
        400,
        "binary data alone",
    ),
    "Triton's classes": (
        {"inputs": [ONE], "outputs": [{"name": "logits", "parameters": {"classification": 2}}]},
        400,
        "does not offer",
    ),
    "a time that is past": ({"inputs": [ONE], "parameters": {"timeout": 1}}, 504, "time"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_the_body_of_the_protocol(client: TestClient, name: str) -> None:
    record, code, words = REFUSED[name]
    reply = client.post("/v2/models/tiny/infer", json=record)
    assert reply.status_code == code, reply.text
    assert set(reply.json()) == {"error"} and words in reply.json()["error"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "texts must be a list"),
        ({"texts": "hello"}, "texts must be a list"),
        ({"texts": []}, "no texts"),
        ({"texts": ["a"], "customers": ["acme", "beta"]}, "1 rows but 2 customers"),
        ({"texts": ["a"], "customer": 7}, "customer must be a text"),
        ({"texts": ["a"], "customer": "acme", "customers": ["acme"]}, "not both"),
        ({"texts": ["a"], "text": "b"}, "no field 'text'"),
        ({"texts": ["a"], "pairs": ["b", "c"]}, "1 texts but 2 second texts"),
    ],
)
def test_what_is_wrong_with_plain_json(client: TestClient, record: dict[str, Any], words: str) -> None:
    reply = client.post("/v1/classify", json=record)
    assert reply.status_code == 400 and words in reply.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff", b'{"texts": ["\\ud800"]}'])
def test_bodies_that_are_no_request(client: TestClient, body: bytes) -> None:
    for path in ("/v1/classify", "/v2/models/tiny/infer"):
        reply = client.post(path, content=body)
        assert reply.status_code == 400 and set(reply.json()) == {"error"}


PATHS = ["/v1/classify", "/v2/models/tiny/infer"]
GOOD = orjson.dumps({"inputs": [ONE | {"name": name} for name in ("text", "customer")], "texts": ["a"]})
HEADERS = {
    "inference-header-content-length": st.integers(-5, 300).map(str) | st.text("0123456789-+x ", max_size=25),
    "content-encoding": st.sampled_from(["gzip", "deflate", "br", "", "gzip, gzip"]),
    "x-request-timeout-ms": st.text("0123456789-.", max_size=12),
    "content-length": st.sampled_from(["0", "1", "99999999999999999999", "x"]),
    "accept-encoding": st.text("gzip,deflate;q=0.1*", max_size=20),
    "authorization": st.text(" abBearer", max_size=20),
}


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good body with bytes changed, taken out or put in; or any bytes."""
    body = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(body)))
        body[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return draw(st.sampled_from([bytes(body), draw(st.binary(max_size=50))]))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damaged(), st.fixed_dictionaries({}, optional=HEADERS), st.sampled_from(["/v1/classify", "/v2/models/tiny/infer"])
)
def test_whatever_comes_is_answered_or_is_the_clients_mistake(
    client: TestClient, body: bytes, headers: dict[str, str], path: str
) -> None:
    reply = client.post(path, content=body, headers=headers)
    assert reply.status_code == 200 or (400 <= reply.status_code < 500 or reply.status_code == 504), reply.text
    assert reply.status_code == 200 or set(reply.json()) == {"error"}


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/embeddings", "/v2/models/tiny/infer"])
def test_what_there_is_no_room_for_is_not_read(client: TestClient, model: ServedModel, path: str) -> None:
    model.engine.max_rows = 0  # type: ignore[attr-defined]
    reply = client.post(path, content=b"no JSON")
    assert reply.status_code == 429 and reply.headers["retry-after"] == "1" and "queue is full" in reply.json()["error"]
    model.engine.max_rows = 4096  # type: ignore[attr-defined]
    assert client.post(path, content=b"no JSON").status_code == 400


def test_a_full_queue_says_when_to_come_again(client: TestClient, model: ServedModel) -> None:
    model.engine.max_rows = 2  # type: ignore[attr-defined]
    reply = client.post("/v1/classify", json={"texts": TEXTS})
    assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
    assert client.post("/v1/classify", json={"texts": TEXTS[:2]}).status_code == 200
    # A request that was refused or failed leaves nothing reserved.
    for _ in range(3):
        assert client.post("/v2/models/tiny/infer", json=REFUSED["ids of no token"][0]).status_code == 400
        assert client.post("/v1/classify", json={"texts": TEXTS[:2], "customer": "nobody"}).status_code == 404
    assert client.post("/v1/classify", json={"texts": TEXTS[:2]}).status_code == 200
