"""Whose a request is, held against what the routes themselves understand."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("orjson", reason="needs the extra serve")

from qrlora_deploy.serving.http.classify import parse_classify
from qrlora_deploy.serving.http.protocol import parse_infer
from qrlora_deploy.serving.inference.questions import question_of
from qrlora_deploy.serving.inference.tensors import LENGTH
from qrlora_deploy.serving.ray.whose import customer_of

NAME = st.none() | st.text(max_size=6)
NAMES = st.lists(NAME, min_size=1, max_size=4)


def first(customers: list[str | None]) -> str | None:
    return next((name for name in customers if name), None)


def tensor(name: str, texts: list[str], binary: bool) -> tuple[dict[str, Any], bytes]:
    """An input of the protocol, and its binary data."""
    head: dict[str, Any] = {"name": name, "datatype": "BYTES", "shape": [len(texts)]}
    if not binary:
        return head | {"data": texts}, b""
    raw = b"".join(LENGTH.pack(len(text.encode())) + text.encode() for text in texts)
    return head | {"parameters": {"binary_data_size": len(raw)}}, raw


@given(NAME, NAMES, st.booleans())
def test_plain_json(one: str | None, several: list[str | None], each: bool) -> None:
    record: dict[str, Any] = {"texts": ["a"] * len(several)} | ({"customers": several} if each else {"customer": one})
    assert customer_of(orjson.dumps(record)) == first(parse_classify(record)[1])


@given(NAMES, st.booleans(), st.booleans(), st.booleans())
def test_the_protocol(several: list[str | None], text_binary: bool, binary: bool, before: bool) -> None:
    names = [name or "" for name in several]
    inputs = [tensor("text", ["what"] * len(names), text_binary), tensor("customer", names, binary)]
    if before:
        inputs.reverse()
    head = orjson.dumps({"inputs": [one for one, _ in inputs]})
    body = head + b"".join(raw for _, raw in inputs)
    asked = parse_infer(body, len(head), ("logits",))
    assert customer_of(body, str(len(head))) == first(question_of(asked)[1])


@given(NAME)
def test_a_parameter_of_the_protocol(one: str | None) -> None:
    parameters = {} if one is None else {"customer": one}
    head = orjson.dumps({"parameters": parameters, "inputs": [tensor("text", ["what"], binary=False)[0]]})
    assert customer_of(head) == first(question_of(parse_infer(head, None, ("logits",)))[1])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["customer", "customers", "inputs", "parameters", "name", "data", "binary_data_size"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(JSON, st.binary(max_size=12), st.none() | st.text(max_size=4) | st.integers(0, 99).map(str))
def test_what_makes_no_sense_has_no_customer_or_a_text(record: Any, rest: bytes, length: str | None) -> None:
    assert isinstance(customer_of(orjson.dumps(record) + rest, length), str | None)
    assert customer_of(rest, length) is None
