"""Tensors of the client: read by an independent reader of the protocol, and whatever a server sends."""

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("httpx", reason="needs the extra client")

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qrlora_deploy.client import BadAnswerError, Inference
from qrlora_deploy.client.answers import read_inference
from qrlora_deploy.client.calls import HEADER_LENGTH, Call, infer_call
from qrlora_deploy.client.tensors import DTYPES

ARRAYS = st.sampled_from(list(DTYPES.values())).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4))
)
TEXTS = st.lists(st.text(max_size=12), min_size=1, max_size=5)


def read(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request, and its inputs as lists, read as the protocol's pages say: without the client's own reader."""
    size = int(call.headers.get(HEADER_LENGTH, len(call.body)))
    record, rest = json.loads(call.body[:size]), call.body[size:]
    found = {}
    for item in record["inputs"]:
        if "data" in item:
            found[item["name"]] = item["data"]
            continue
        raw, rest = rest[: item["parameters"]["binary_data_size"]], rest[item["parameters"]["binary_data_size"] :]
        if item["datatype"] == "BYTES":
            texts = []
            while raw:
                end = 4 + int.from_bytes(raw[:4], "little")
                texts.append(raw[4:end].decode())
                raw = raw[end:]
            found[item["name"]] = texts
        else:
            found[item["name"]] = np.frombuffer(raw, np.dtype(DTYPES[item["datatype"]])).tolist()
    assert rest == b""
    return record, found


@settings(max_examples=150, deadline=None)
@given(array=ARRAYS, texts=TEXTS)
def test_binary_requests_say_what_was_given(array: np.ndarray, texts: list[str]) -> None:
    record, found = read(infer_call("tiny", {"x": array, "text": texts}, "acme", ["logits"], request_id="r"))
    assert record["parameters"] == {"binary_data_output": True, "customer": "acme"}
    assert record["id"] == "r" and record["outputs"] == [{"name": "logits"}]
    assert [item["shape"] for item in record["inputs"]] == [list(array.shape), [len(texts)]]
    assert DTYPES[record["inputs"][0]["datatype"]] == array.dtype
    np.testing.assert_array_equal(np.array(found["x"], array.dtype), array.ravel())
    assert found["text"] == texts


def test_json_requests_hold_plain_lists() -> None:
    ids = np.arange(6).reshape(2, 3)
    record, found = read(infer_call("a/b", {"input_ids": ids, "customer": ["acme", ""]}, binary=False))
    assert found == {"input_ids": [0, 1, 2, 3, 4, 5], "customer": ["acme", ""]}
    assert record["inputs"][0] == {
        "name": "input_ids",
        "datatype": "INT64",
        "shape": [2, 3],
        "data": found["input_ids"],
    }
    assert "id" not in record and infer_call("a/b", {"x": ids}).path == "/v2/models/a%2Fb/infer"


def test_arrays_are_sent_in_row_order_and_little_endian() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    record, found = read(infer_call("tiny", {"x": array}))
    assert record["inputs"][0]["datatype"] == "INT32" and record["inputs"][0]["shape"] == [3, 2]
    assert found["x"] == [0, 3, 1, 4, 2, 5]


def reply(outputs: list[tuple[dict[str, Any], bytes | None]], **more: Any) -> tuple[bytes, str | None]:
    """The body of an answer, and the length of its JSON."""
    items = [item | ({} if raw is None else {"parameters": {"binary_data_size": len(raw)}}) for item, raw in outputs]
    head = json.dumps({"model_name": "tiny", "outputs": items} | more).encode()
    pieces = [raw for _, raw in outputs if raw is not None]
    return head + b"".join(pieces), str(len(head)) if pieces else None


def test_answers_are_read_by_json_and_binary() -> None:
    logits = np.array([[0.5, -1.5], [2.0, 3.25]], np.float32)
    text = b"\x01\x00\x00\x00a\x02\x00\x00\x00\xc3\xa9"
    found = read_inference(
        *reply(
            [
                ({"name": "logits", "datatype": "FP32", "shape": [2, 2]}, logits.tobytes()),
                ({"name": "half", "datatype": "FP16", "shape": [2, 2]}, logits.astype(np.float16).tobytes()),
                ({"name": "labels", "datatype": "BYTES", "shape": [2]}, text),
                ({"name": "scores", "datatype": "FP32", "shape": [2, 1], "data": [[0.5], [1]]}, None),
                ({"name": "label", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}, None),
            ],
            id="r",
            parameters={"customer_digest": "d"},
        )
    )
    assert (found.model, found.id, found.parameters) == ("tiny", "r", {"customer_digest": "d"})
    np.testing.assert_array_equal(found.outputs["logits"], logits)
    assert found.outputs["half"].dtype == np.float16
    assert found.outputs["labels"].tolist() == ["a", "\u00e9"]
    assert found.outputs["scores"].dtype == np.float32 and found.outputs["scores"].tolist() == [[0.5], [1.0]]
    assert found.outputs["label"].tolist() == ["a", "b"]


FP32 = {"name": "x", "datatype": "FP32", "shape": [2]}
WRONG = {
    "too few bytes": reply([(FP32, b"\0" * 4)]),
    "half a number": reply([(FP32, b"\0" * 7)]),
    "another datatype": reply([(FP32 | {"datatype": "FP8"}, b"\0" * 8)]),
    "a negative shape": reply([(FP32 | {"shape": [-2, 3]}, b"\0" * 8)]),
    "a size that no array has": reply([(FP32 | {"shape": [2**70]}, b"\0" * 8)]),
    "a number that no array has": reply([(FP32 | {"data": [10**400, 1]}, None)]),
    "a number beyond its datatype": reply([(FP32 | {"datatype": "INT8", "data": [300, 1]}, None)]),
    "a negative number for an unsigned one": reply([(FP32 | {"datatype": "UINT8", "data": [-1, 1]}, None)]),
    "a long text among many numbers": reply([(FP32 | {"shape": [50_001], "data": [1] * 50_000 + ["a" * 2**20]}, None)]),
    "null for a number": reply([(FP32 | {"data": [None, 1.0]}, None)]),
    "a text for a number": reply([(FP32 | {"data": ["1", "2"]}, None)]),
    "a fraction for an integer": reply([(FP32 | {"datatype": "INT64", "data": [1.5, 2]}, None)]),
    "a cut text": reply([(FP32 | {"datatype": "BYTES", "shape": [1]}, b"\x09\0\0\0a")]),
    "a cut length": reply([(FP32 | {"datatype": "BYTES", "shape": [1]}, b"\x09\0")]),
    "no UTF-8": reply([(FP32 | {"datatype": "BYTES", "shape": [1]}, b"\x01\0\0\0\xff")]),
    "neither data nor bytes": reply([(FP32, None)]),
    "a length that lies": (reply([(FP32, b"\0" * 8)])[0], "7"),
    "a length that is none": (b"{}", "many"),
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_an_answer_of_another_form_is_refused(answer: tuple[bytes, str | None]) -> None:
    with pytest.raises(BadAnswerError, match="cannot be read"):
        read_inference(*answer)


@settings(max_examples=300, deadline=None)
@given(
    cut=st.integers(0, 400), flip=st.integers(0, 399), bit=st.integers(0, 7), length=st.none() | st.integers(-9, 400)
)
def test_a_damaged_answer_is_read_or_refused(cut: int, flip: int, bit: int, length: int | None) -> None:
    outputs = [(FP32, b"\0" * 8), ({"name": "t", "datatype": "BYTES", "shape": [1]}, b"\x01\0\0\0a")]
    body, right = reply(list(outputs), id="r")
    damaged = bytearray(body[:cut] if cut < len(body) else body)
    if flip < len(damaged):
        damaged[flip] ^= 1 << bit
    try:
        found = read_inference(bytes(damaged), right if length is None else str(length))
    except BadAnswerError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(found, Inference)
