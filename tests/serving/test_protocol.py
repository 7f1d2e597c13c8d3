"""The protocol's bytes: what is well-formed comes back as it was, and every lie is one error of ours."""

import json
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import MalformedInputError, QrloraError
from qrlora_deploy.serving.http.protocol import InferAnswer, parse_infer, write_answer
from qrlora_deploy.serving.inference.questions import question_of
from qrlora_deploy.serving.inference.requests import Wanted
from qrlora_deploy.serving.inference.tensors import PIECE
from qrlora_deploy.serving.outputs import PADDING, outputs_of
from qrlora_deploy.tasks.classification import Classification

NAMES = outputs_of(Classification())
TEXTS = st.lists(st.text(max_size=20), min_size=1, max_size=5)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


def bytes_of(texts: list[str]) -> bytes:
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)


def binary_input(name: str, datatype: str, shape: list[int], raw: bytes) -> tuple[dict[str, Any], bytes]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}, raw


def body_of(inputs: list[tuple[dict[str, Any], bytes]], **more: Any) -> tuple[bytes, int]:
    head = orjson.dumps({"inputs": [record for record, _ in inputs], **more})
    return b"".join([head, *(raw for _, raw in inputs)]), len(head)


@given(TEXTS)
def test_texts_are_the_same_in_both_forms(texts: list[str]) -> None:
    body, header = body_of([binary_input("text", "BYTES", [len(texts)], bytes_of(texts))])
    plain = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts), 1], "data": [[t] for t in texts]}]}
    assert parse_infer(body, header, NAMES).inputs["text"] == texts
    assert parse_infer(orjson.dumps(plain), None, NAMES).inputs["text"] == texts


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_numbers_are_the_same_in_both_forms(rows: int, length: int, data: st.DataObject) -> None:
    whole = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=rows * length, max_size=rows * length)
    ids = np.array(data.draw(whole), dtype=np.int64).reshape(rows, length)
    body, header = body_of([binary_input("input_ids", "INT64", [rows, length], ids.tobytes())])
    plain = {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [rows, length], "data": ids.tolist()}]}
    np.testing.assert_array_equal(parse_infer(body, header, NAMES).inputs["input_ids"], ids)
    np.testing.assert_array_equal(parse_infer(orjson.dumps(plain), None, NAMES).inputs["input_ids"], ids)


def asked(body: bytes, header: int | None) -> None:
    """What the front does with a body; nothing but our own error may come out."""
    try:
        question_of(parse_infer(body, header, NAMES))
    except MalformedInputError as error:
        assert "\n" not in str(error)


@settings(max_examples=400)
@given(ANYTHING)
def test_any_json_is_a_request_or_refused(record: Any) -> None:
    asked(json.dumps(record).encode(), None)


@settings(max_examples=400)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.sampled_from(["text", "input_ids", "customer"]) | SCALARS,
            "datatype": st.sampled_from(["BYTES", "INT64", "FP16"]) | SCALARS,
            "shape": st.lists(st.integers(-1, 3) | st.integers(-(2**63), 2**63 - 1), max_size=3) | ANYTHING,
            "data": ANYTHING,
            "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-2, 40) | SCALARS}),
        },
    ),
    st.binary(max_size=40),
    st.integers(-8, 48),
)
def test_any_tensor_is_read_or_refused(tensor: dict[str, Any], raw: bytes, moved: int) -> None:
    head = json.dumps({"inputs": [tensor]}).encode()
    asked(head + raw, len(head) + moved)
    asked(head + raw, len(head))


@settings(max_examples=400)
@given(TEXTS, st.data())
def test_binary_data_that_lies_is_refused(texts: list[str], data: st.DataObject) -> None:
    record, raw = binary_input("text", "BYTES", [len(texts)], bytes_of(texts))
    place = data.draw(st.integers(0, len(raw) - 1))
    changed = bytearray(raw)
    changed[place] = data.draw(st.integers(0, 255))
    asked(*body_of([(record, bytes(changed))]))
    # Cut, or longer than said: never taken for something else.
    for size in (len(raw) - 1, len(raw) + 1):
        body, header = body_of([(record | {"parameters": {"binary_data_size": size}}, raw)])
        with pytest.raises(MalformedInputError):
            parse_infer(body, header, NAMES)
    with pytest.raises(MalformedInputError):
        parse_infer(*body_of([(record | {"shape": [len(texts) + 1]}, raw)]), NAMES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": {"binary_data_size": True}}, "binary_data_size"),
        ({"parameters": {"binary_data_size": 2**80}}, "binary_data_size"),
        ({"parameters": {"binary_data_size": -1}}, "binary_data_size"),
        ({"shape": [2**62, 2**62]}, "shape"),
        ({"shape": [10**9]}, "not that of 1 elements"),
        ({"data": ["a"]}, "give one of them"),
        ({"datatype": "FP16"}, "BYTES or INT64"),
        ({"parameters": {"shared_memory_region": "r"}}, "does not offer"),
    ],
)
def test_each_lie_is_named(change: dict[str, Any], words: str) -> None:
    record, raw = binary_input("text", "BYTES", [1], bytes_of(["a"]))
    head = json.dumps({"inputs": [record | change]}).encode()
    with pytest.raises(MalformedInputError, match=words):
        parse_infer(head + raw, len(head), NAMES)


@pytest.mark.parametrize("shape", [[0, 2**62], [2**63 - 1, 0], [2**40, 2**40, 0]])
def test_a_size_of_0_hides_no_others(shape: list[int]) -> None:
    record, raw = binary_input("input_ids", "INT64", shape, b"")
    for body in (body_of([(record, raw)]), body_of([({**record, "parameters": {}, "data": []}, b"")])):
        with pytest.raises(MalformedInputError, match="shape"):
            parse_infer(*body, NAMES)


@pytest.mark.parametrize("other", ["a" * 2**20, True, 1.0, None, [1, 2], {"a": 1}, 2**63])
def test_numbers_among_which_something_else_is_are_refused(other: Any) -> None:
    # A long text must not make every other element as long: this would take 200 GB.
    record = {"name": "input_ids", "datatype": "INT64", "shape": [50_001, 1], "data": [1] * 50_000 + [other]}
    with pytest.raises(MalformedInputError, match="data must hold whole numbers"):
        parse_infer(*body_of([(record, b"")]), NAMES)


@pytest.mark.parametrize("nested", [False, True])
def test_numbers_that_are_read_in_pieces(nested: bool) -> None:
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (PIECE // 2 + 3, 5))
    record = {"name": "input_ids", "datatype": "INT64", "shape": list(numbers.shape)}
    record["data"] = numbers.tolist() if nested else numbers.ravel().tolist()
    found = parse_infer(*body_of([(record, b"")]), NAMES).inputs["input_ids"]
    np.testing.assert_array_equal(found, numbers)


@pytest.mark.parametrize("last", [[1, 2, 3], [[1, 2]], 1, []])
def test_rows_of_another_length_in_another_piece_are_refused(last: Any) -> None:
    record = {"name": "input_ids", "datatype": "INT64", "shape": [PIECE + 1, 2], "data": [[1, 2]] * PIECE + [last]}
    with pytest.raises(MalformedInputError, match=r"data .* (numbers|elements)"):
        parse_infer(*body_of([(record, b"")]), NAMES)


def test_a_text_that_is_not_utf8_is_refused() -> None:
    raw = struct.pack("<I", 1) + b"\xff"
    with pytest.raises(MalformedInputError, match="text 0 is not UTF-8"):
        parse_infer(*body_of([binary_input("text", "BYTES", [1], raw)]), NAMES)


def parts(answer: InferAnswer) -> tuple[Any, bytes]:
    return orjson.loads(answer.body[: answer.header_length]), answer.body[answer.header_length or len(answer.body) :]


def test_an_answer_with_binary_data() -> None:
    logits = np.array([[1.5, PADDING["FP32"]], [7e4, np.nan]], dtype=np.float32)
    labels = np.array([["é", ""]], dtype=object)
    wanted = [Wanted("logits", True, "FP32"), Wanted("labels", True, "BYTES"), Wanted("logits", True, "FP16")]
    head, raw = parts(write_answer("m", "1", "7", list(zip(wanted, [logits, labels, logits], strict=True)), {}))
    assert head["id"] == "7" and [output["datatype"] for output in head["outputs"]] == ["FP32", "BYTES", "FP16"]
    sizes = [output["parameters"]["binary_data_size"] for output in head["outputs"]]
    assert sizes == [16, 4 + 2 + 4, 8] and sum(sizes) == len(raw)
    np.testing.assert_array_equal(np.frombuffer(raw[:16], "<f4").reshape(2, 2), logits)
    assert raw[16:26] == bytes_of(["é", ""])
    # The padding stays the lowest finite number; what is too large for half precision shows as such.
    np.testing.assert_array_equal(np.frombuffer(raw[26:], "<f2"), np.float16([1.5, PADDING["FP16"], np.inf, np.nan]))


def test_an_answer_in_json_has_no_word_for_what_is_not_finite() -> None:
    good = np.array([[0.1, PADDING["FP32"]]], dtype=np.float32)
    head, raw = parts(write_answer("m", "1", "", [(Wanted("logits"), good)], {}))
    assert raw == b"" and "id" not in head
    np.testing.assert_array_equal(np.float32(head["outputs"][0]["data"]), good[0])
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(QrloraError, match="row 1 of logits is not finite"):
            write_answer("m", "1", "", [(Wanted("logits"), np.float32([[0, 0], [0, value]]))], {})
