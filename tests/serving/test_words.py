"""A bundle that tags words behind a server, held against a predictor."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="makes bundles")
pytest.importorskip("httpx", reason="needs the extra client")

from starlette.testclient import TestClient

from qrlora_deploy.runtime.prediction.predictor import Predictor
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.opening import OpenModel
from tests.cli.test_token_classification import prepare, switchable
from tests.serving.opened import client_of, opened_model
from tests.tiny import SENTENCES

pytestmark = pytest.mark.slow

TEXTS = [*SENTENCES, "  Paris, fly to   boston! "]
OWNERS = ["acme", "bolt", None, "acme", "bolt", None, "acme"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("words"), "Bert")
    switchable(folder)
    return folder


@pytest.fixture
def opened(place: Path) -> Iterator[OpenModel]:
    with opened_model("words", place / "all", place / "customers") as model:
        yield model


@pytest.fixture
def client(opened: OpenModel) -> TestClient:
    return client_of(opened)


def test_spans_are_those_of_a_predictor(client: TestClient, opened: OpenModel) -> None:
    assert isinstance(opened.session, SwitchableSession)
    expected = Predictor(opened.session).predict(TEXTS, customers=OWNERS)
    assert sum(len(answer.spans) for answer in expected) > 5
    answers = client.post("/v1/classify", json={"texts": TEXTS, "customers": OWNERS}).json()["answers"]
    for text, found, wanted in zip(TEXTS, answers, expected, strict=True):
        assert (found["label"], found["labels"]) == (wanted.label, list(wanted.labels))
        spans = [(span["text"], span["label"], span["start"], span["end"]) for span in found["spans"]]
        assert spans == [(span.text, span.label, span.start, span.end) for span in wanted.spans]
        assert all(text[start:end] == part for part, _, start, end in spans)
        assert [span["score"] for span in found["spans"]] == pytest.approx(
            [span.score for span in wanted.spans], rel=1e-4
        )


def test_tags_are_no_tensors_and_pairs_have_none(client: TestClient) -> None:
    inputs = [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}]
    reply = client.post("/v2/models/words/infer", json={"inputs": inputs})
    assert reply.status_code == 400 and "/v1/classify" in reply.json()["error"]
    assert client.get("/v2/models/words").json()["outputs"] == []
    reply = client.post("/v1/classify", json={"texts": ["a"], "pairs": ["b"]})
    assert reply.status_code == 400 and "takes no pairs" in reply.json()["error"]
