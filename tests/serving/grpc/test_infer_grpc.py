"""Inference over gRPC, held against a `Predictor` on the same bundle and customers."""

from typing import Any

import numpy as np
import pytest

from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.prediction.predictor import Prediction, Predictor
from qrlora_deploy.runtime.prediction.tokenizing import TextEncoder
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.grpc.service import InferenceService
from qrlora_deploy.version import __version__
from tests.serving.grpc.client import (
    Client,
    asking,
    message,
    outputs_of,
    raw_request,
    raw_texts,
    request,
    tensor,
    texts,
)
from tests.tiny import LABELS, SENTENCES
from tests.tolerances import FP16_ROWS, FP32_ONNX

OWNERS = ["acme", None, "beta", "gamma", "delta", "acme"]
NAMES = [name or "" for name in OWNERS]
TEXTS = list(SENTENCES)
OWN_LABELS = {"gamma": ("no", "yes"), "delta": tuple("abcdef")}
LOWEST = np.finfo(np.float32).min


@pytest.fixture
def expected(session: SwitchableSession, model: Any) -> list[Prediction]:
    """What the predictor says to each text, alone."""
    predictor = Predictor(session)
    return [predictor.predict([text], customers=[name])[0] for text, name in zip(TEXTS, OWNERS, strict=True)]


def check_rows(found: dict[str, np.ndarray], expected: list[Prediction]) -> None:
    for row, (owner, wanted) in enumerate(zip(OWNERS, expected, strict=True)):
        own = OWN_LABELS.get(owner or "", LABELS)
        assert list(found["labels"][row]) == [*own, *[""] * (6 - len(own))]
        np.testing.assert_allclose(found["logits"][row, : len(own)], wanted.logits, **FP32_ONNX)
        assert (found["logits"][row, len(own) :] == LOWEST).all()
        odds = np.exp(np.array(wanted.logits) - max(wanted.logits))
        np.testing.assert_allclose(found["scores"][row, : len(own)], odds / odds.sum(), **FP32_ONNX)
        assert found["label"][row] == wanted.label


def test_typed_contents(
    service: InferenceService, expected: list[Prediction], customers: dict[str, Coefficients]
) -> None:
    reply = asking(service, lambda client: client.infer(request([texts(TEXTS), texts(NAMES, "customer")], id="7")))
    assert (reply.model_name, reply.model_version, reply.id) == ("tiny", "1", "7")
    assert not reply.raw_output_contents
    found = outputs_of(reply)
    check_rows(found, expected)
    assert list(found["digest"]) == [customers[name].digest if name else "" for name in OWNERS]


def test_raw_contents(service: InferenceService, expected: list[Prediction]) -> None:
    sent = raw_request([("text", "BYTES", [6], raw_texts(TEXTS)), ("customer", "BYTES", [6], raw_texts(NAMES))])
    reply = asking(service, lambda client: client.infer(sent))
    assert len(reply.raw_output_contents) == len(reply.outputs)
    assert not any(output.HasField("contents") for output in reply.outputs)
    check_rows(outputs_of(reply), expected)


@pytest.mark.parametrize("is_raw", [True, False])
def test_token_ids(
    service: InferenceService, session: SwitchableSession, expected: list[Prediction], is_raw: bool
) -> None:
    encoded = TextEncoder(session.bundle).encode(TEXTS)
    if is_raw:
        ids = [(name, "INT64", array.shape, array.tobytes()) for name, array in encoded.items()]
        sent = raw_request([*ids, ("customer", "BYTES", [6], raw_texts(NAMES))])
    else:
        typed = [tensor(name, "INT64", array.shape, int64_contents=array.ravel()) for name, array in encoded.items()]
        sent = request([*typed, texts(NAMES, "customer")])
    check_rows(outputs_of(asking(service, lambda client: client.infer(sent))), expected)


def test_one_customer_by_a_parameter_and_outputs_by_name(
    service: InferenceService, session: SwitchableSession, customers: dict[str, Coefficients], model: Any
) -> None:
    sent = request([texts(TEXTS)], ["label", "logits"], "beta")
    reply = asking(service, lambda client: client.infer(sent))
    wanted = Predictor(session).predict(TEXTS, customers=["beta"] * 6)
    assert [output.name for output in reply.outputs] == ["label", "logits"]
    assert reply.parameters["customer_digest"].string_param == customers["beta"].digest
    assert reply.parameters["base_digest"].string_param == model.bundle.manifest.base_digest
    found = outputs_of(reply)
    np.testing.assert_allclose(found["logits"], [answer.logits for answer in wanted], **FP32_ONNX)
    assert list(found["label"]) == [answer.label for answer in wanted]


def test_pairs(service: InferenceService, session: SwitchableSession, model: Any) -> None:
    wanted = Predictor(session).predict(TEXTS[:2], TEXTS[2:4], customers=["acme", "acme"])
    sent = request([texts(TEXTS[:2]), texts(TEXTS[2:4], "text_pair")], ["logits"], "acme")
    found = outputs_of(asking(service, lambda client: client.infer(sent)))
    np.testing.assert_allclose(found["logits"], [answer.logits for answer in wanted], **FP32_ONNX)


def test_the_client_chooses_how_outputs_come(service: InferenceService) -> None:
    async def ask(client: Client) -> list[Any]:
        plain = request([texts(TEXTS)], ["logits", "label"], "acme")
        raw = request([texts(TEXTS)], ["logits", "label"], "acme")
        raw.parameters["binary_data_output"].bool_param = True
        half = request([texts(TEXTS)], ["logits", "label"], "acme")
        half.outputs[0].parameters["binary_data"].bool_param = True
        half.outputs[0].parameters["datatype"].string_param = "FP16"
        return [await client.infer(sent) for sent in (plain, raw, half)]

    plain, raw, half = asking(service, ask)
    assert not plain.raw_output_contents
    assert len(raw.raw_output_contents) == len(half.raw_output_contents) == 2
    np.testing.assert_array_equal(outputs_of(raw)["logits"], outputs_of(plain)["logits"])
    assert half.outputs[0].datatype == "FP16"
    np.testing.assert_allclose(outputs_of(half)["logits"], outputs_of(plain)["logits"], **FP16_ROWS)
    assert list(outputs_of(half)["label"]) == list(outputs_of(plain)["label"])


def test_numbers_that_are_not_finite_arrive(
    service: InferenceService, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        @staticmethod
        def predict(inputs: Any, owners: Any) -> Any:
            return np.array([[0.0, np.nan, np.inf, 1.0]], dtype=np.float32), [LABELS]

    monkeypatch.setattr(model.engine, "session", Broken)
    found = outputs_of(asking(service, lambda client: client.infer(request([texts(["a"])], ["logits"]))))
    np.testing.assert_array_equal(found["logits"], [[0.0, np.nan, np.inf, 1.0]])


def test_what_the_server_says_of_itself(service: InferenceService, model: Any) -> None:
    async def ask(client: Client) -> list[Any]:
        return [
            await client.call(name, message(f"{name}Request", **fields))
            for name, fields in (
                ("ServerLive", {}),
                ("ServerReady", {}),
                ("ModelReady", {"name": "tiny", "version": "1"}),
                ("ServerMetadata", {}),
                ("ModelMetadata", {"name": "tiny"}),
            )
        ]

    live, ready, model_ready, server, metadata = asking(service, ask)
    assert live.live and ready.ready and model_ready.ready
    assert (server.name, server.version, list(server.extensions)) == (
        "qrlora-deploy",
        __version__,
        ["statistics", "model_configuration"],
    )
    assert metadata.name == "tiny" and list(metadata.versions) == ["1"]
    inputs = {found.name: (found.datatype, list(found.shape)) for found in metadata.inputs}
    assert inputs["text"] == inputs["customer"] == ("BYTES", [-1]) and inputs["input_ids"] == ("INT64", [-1, -1])
    outputs = {found.name: (found.datatype, list(found.shape)) for found in metadata.outputs}
    assert outputs["logits"] == ("FP32", [-1, -1]) and outputs["label"] == ("BYTES", [-1])
