"""Replies over HTTP have the shapes of the Open Inference Protocol's published schema (`open_inference_rest.yaml`).

The schema's constraints are said here again, strictly: what must be there, of which type; more may be there.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.served import Models
from tests.tiny import SENTENCES

pytest.importorskip("httpx", reason="needs the extra client")
from starlette.testclient import TestClient

MODEL = "/v2/models/tiny/versions/1"


class Published(BaseModel):
    """Types as they are, none taken for another."""

    model_config = ConfigDict(strict=True, extra="allow")


class ServerMetadata(Published):
    name: str
    version: str
    extensions: list[str]


class MetadataTensor(Published):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Published):
    name: str
    platform: str
    versions: list[str] = []
    inputs: list[MetadataTensor] = []
    outputs: list[MetadataTensor] = []


class Output(Published):
    name: str
    shape: list[int]
    datatype: str
    data: list[float | int | str | bool]
    parameters: dict[str, Any] = {}


class Inference(Published):
    model_name: str
    outputs: list[Output]
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Any] = {}


class Refusal(Published):
    error: str


@pytest.fixture
def client(models: Models) -> Iterator[TestClient]:
    front = Front(models)
    front.life.begin()
    with TestClient(make_app(front)) as client:
        yield client


def text(values: list[str]) -> dict[str, Any]:
    return {"name": "text", "shape": [len(values)], "datatype": "BYTES", "data": values}


IDS = {"name": "input_ids", "shape": [2, 3], "datatype": "INT64", "data": [[2, 8, 3], [2, 9, 3]]}
REQUESTS: dict[str, dict[str, Any]] = {
    "texts": {"inputs": [text(list(SENTENCES))]},
    "an id": {"id": "42", "inputs": [text(["a"])]},
    "parameters everywhere": {
        "parameters": {"customer": "acme"},
        "inputs": [text(["a"]) | {"parameters": {}}],
        "outputs": [{"name": "logits", "parameters": {}}],
    },
    "nested data": {"inputs": [IDS]},
    "flat data": {"inputs": [IDS | {"data": [2, 8, 3, 2, 9, 3]}]},
    "a customer a row": {"inputs": [text(["a", "b"]), text(["acme", "gamma"]) | {"name": "customer"}]},
    **{f"the output {name}": {"inputs": [text(["a"])], "outputs": [{"name": name}]} for name in ("labels", "digest")},
}


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_the_servers_metadata(path: str, client: TestClient) -> None:
    assert "binary_tensor_data" in ServerMetadata.model_validate(client.get(path).json()).extensions


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", f"{MODEL}/ready"])
def test_health(path: str, client: TestClient) -> None:
    assert client.get(path).status_code == 200


def test_a_models_metadata(client: TestClient) -> None:
    found = ModelMetadata.model_validate(client.get(MODEL).json())
    assert found.name == "tiny" and found.versions == ["1"] and len(found.inputs) > 3 and len(found.outputs) == 5
    assert {"text", "input_ids"} <= {tensor.name for tensor in found.inputs}


@pytest.mark.parametrize("asked", REQUESTS)
def test_an_inference(asked: str, client: TestClient) -> None:
    request = REQUESTS[asked]
    reply = client.post(f"{MODEL}/infer", json=request)
    assert reply.status_code == 200, reply.text
    found = Inference.model_validate(reply.json())
    assert (found.model_name, found.model_version, found.id) == ("tiny", "1", request.get("id", ""))
    named = [output["name"] for output in request.get("outputs", ())]
    assert [output.name for output in found.outputs] == (named or ["logits", "scores", "labels", "label", "digest"])
    for output in found.outputs:
        size = 1
        for axis in output.shape:
            size *= axis
        assert len(output.data) == size, "data is flat, in the order of rows"


@pytest.mark.parametrize(
    ("path", "request_body", "status"),
    [
        (f"{MODEL}/infer", {"inputs": [text(["a"]) | {"name": "x"}]}, 400),
        (f"{MODEL}/infer", {}, 400),
        (f"{MODEL}/infer", {"inputs": [text(["a"]) | {"shape": [2]}]}, 400),
        (f"{MODEL}/infer", {"inputs": [text(["a"])], "outputs": [{"name": "x"}]}, 400),
        ("/v2/models/none/infer", {"inputs": [text(["a"])]}, 404),
        ("/v2/models/none", None, 404),
        (f"{MODEL[:-1]}7", None, 404),
    ],
)
def test_a_refusal(path: str, request_body: Any, status: int, client: TestClient) -> None:
    reply = client.get(path) if request_body is None else client.post(path, json=request_body)
    assert reply.status_code == status
    assert Refusal.model_validate(reply.json()).error


def test_the_schema_refuses_what_it_should() -> None:
    """So that the tests above can fail."""
    good = {"name": "a", "shape": [1], "datatype": "FP32", "data": [1.5]}
    for wrong in ({"shape": [1.5]}, {"data": [None]}, {"data": 1}, {"datatype": 7}, {"name": None}):
        with pytest.raises(ValidationError):
            Inference.model_validate({"model_name": "m", "outputs": [good | wrong]})
