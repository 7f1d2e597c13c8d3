"""Bundles of embeddings behind a server, held against transformers."""

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="makes bundles")
pytest.importorskip("httpx", reason="needs the extra client")

from starlette.testclient import TestClient

from qrlora_deploy.formats.coefficients import read_coefficients
from qrlora_deploy.runtime.prediction.predictor import Predictor
from qrlora_deploy.serving.opening import OpenModel
from tests.cli.running import succeed_here
from tests.cli.test_embedding import EMBEDDING, pooled, save_encoder
from tests.serving.opened import client_of, opened_model
from tests.tiny import SENTENCES

pytestmark = pytest.mark.slow

TEXTS = list(SENTENCES)
OWNERS = ["acme", None] * 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, a customer of it, and their bundle."""
    folder = tmp_path_factory.mktemp("embedding")
    save_encoder(folder / "base", "mean")
    lines = ["anchor\tpositive", *(f"{a}\t{b}" for a, b in zip(SENTENCES, SENTENCES[::-1], strict=True))]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "customers").mkdir()
    basis = ["--basis", "basis.safetensors"]
    task = ["--task", "embedding"]
    succeed_here(["factorize", "base", "--tau", 0.6, "-o", "basis.safetensors"], folder)
    train = ["--data", "pairs.tsv", "--epochs", 4, "--learning-rate", 0.2, "--max-length", 32, *task]
    succeed_here(["train", "base", *basis, *train, "-o", "customers/acme.safetensors"], folder)
    succeed_here(["export", "base", *basis, *task, "-o", "bundle"], folder)
    return folder


@pytest.fixture
def opened(place: Path) -> Iterator[OpenModel]:
    with opened_model("vectors", place / "bundle", place / "customers") as model:
        yield model


@pytest.fixture
def client(opened: OpenModel) -> TestClient:
    return client_of(opened)


@pytest.fixture
def expected(place: Path, opened: OpenModel) -> np.ndarray:
    """Of the base by transformers, of the customer by a predictor."""
    base = pooled(place / "base", "mean", TEXTS)
    found = Predictor(opened.session).embed(TEXTS, customers=["acme"] * 6)  # type: ignore[arg-type]
    assert np.abs(found - base).max() > 0.01
    return np.where(np.arange(6)[:, None] % 2 == 0, found, base)


def test_vectors_in_the_shape_of_openai(client: TestClient, place: Path, expected: np.ndarray) -> None:
    record = client.post("/v1/embeddings", json={"input": TEXTS, "customers": OWNERS, "user": "somebody"}).json()
    assert (record["object"], record["model"]) == ("list", "vectors")
    assert [item["index"] for item in record["data"]] == list(range(6))
    np.testing.assert_allclose([item["embedding"] for item in record["data"]], expected, **EMBEDDING)
    digest = read_coefficients(place / "customers" / "acme.safetensors").digest
    assert [item["customer_digest"] for item in record["data"]] == [digest, ""] * 3
    asked = {"input": TEXTS[0], "customer": "acme", "encoding_format": "base64", "model": "vectors"}
    (item,) = client.post("/v1/embeddings", json=asked).json()["data"]
    found = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
    np.testing.assert_allclose(found, expected[0], **EMBEDDING)


def test_vectors_by_the_protocol(client: TestClient, expected: np.ndarray) -> None:
    described = client.get("/v2/models/vectors").json()
    assert [output["name"] for output in described["outputs"]] == ["embeddings", "digest"]
    inputs = [
        {"name": "text", "datatype": "BYTES", "shape": [6], "data": TEXTS},
        {"name": "customer", "datatype": "BYTES", "shape": [6], "data": [name or "" for name in OWNERS]},
    ]
    first, _ = client.post("/v2/models/vectors/infer", json={"inputs": inputs}).json()["outputs"]
    np.testing.assert_allclose(np.array(first["data"]).reshape(first["shape"]), expected, **EMBEDDING)
    reply = client.post("/v2/models/vectors/infer", json={"inputs": inputs, "outputs": [{"name": "logits"}]})
    assert reply.status_code == 400 and "choose from embeddings" in reply.json()["error"]


@pytest.mark.parametrize(
    ("path", "record", "words"),
    [
        ("/v1/classify", {"texts": ["a"]}, "ask /v1/embeddings"),
        ("/v1/embeddings", {"input": []}, "no texts"),
        ("/v1/embeddings", {"input": [[1, 2]]}, "input must be a list of texts"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "float or base64"),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, "not offered"),
        ("/v1/embeddings", {"input": "a", "model": 1}, "model must be a text"),
    ],
)
def test_what_is_wrong(client: TestClient, path: str, record: dict[str, object], words: str) -> None:
    reply = client.post(path, json=record)
    assert reply.status_code == 400 and words in reply.json()["error"]


def test_a_task_on_pairs_needs_second_texts(
    client: TestClient, opened: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(opened.served.task), "needs_pairs", True)
    reply = client.post("/v1/embeddings", json={"input": "a"})
    assert reply.status_code == 400 and "second texts" in reply.json()["error"]
