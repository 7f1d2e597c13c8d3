"""Requests over gRPC that are none: sizes that lie, fields that do not belong together, bytes at random."""

import os
import random
from typing import Any

import grpc
import pytest

from qrlora_deploy.serving.grpc.service import InferenceService
from tests.damaging import damaged_bytes
from tests.serving.grpc.client import Client, asking, raw_request, raw_texts, request, tensor, texts

DAMAGES = int(os.environ.get("QRLORA_DAMAGES", "300"))
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
TWO = (2).to_bytes(4, "little")


def both() -> Any:
    sent = raw_request([("text", "BYTES", [1], raw_texts(["a"]))])
    sent.inputs[0].contents.bytes_contents.append(b"a")
    return sent


LIES = {
    "more elements than the shape": (request([tensor("text", "BYTES", [1], bytes_contents=[b"a", b"b"])]), "shape"),
    "fewer elements": (request([tensor("text", "BYTES", [2**40], bytes_contents=[b"a"])]), "shape"),
    "a negative size": (request([tensor("text", "BYTES", [-1], bytes_contents=[b"a"])]), "shape"),
    "no shape": (request([tensor("text", "BYTES", [], bytes_contents=[b"a"])]), "shape"),
    "sizes whose product is small again": (
        request([tensor("input_ids", "INT64", [2**32, 2**32], int64_contents=[1])]),
        "shape",
    ),
    "a size of 0 beside one that is too large": (request([tensor("input_ids", "INT64", [0, 2**62])]), "shape"),
    "another field of contents": (request([tensor("text", "BYTES", [1], int64_contents=[1])]), "bytes_contents"),
    "two fields of contents": (
        request([tensor("text", "BYTES", [1], bytes_contents=[b"a"], fp32_contents=[1.0])]),
        "fp32_contents",
    ),
    "no contents": (request([tensor("text", "BYTES", [1])]), "shape"),
    "another datatype": (request([tensor("input_ids", "FP32", [1, 1], fp32_contents=[1.0])]), "datatype"),
    "texts as numbers": (request([tensor("text", "INT64", [1], int64_contents=[1])]), "BYTES"),
    "no UTF-8": (request([tensor("text", "BYTES", [1], bytes_contents=[b"\xff\xfe"])]), "UTF-8"),
    "an input that there is not": (request([texts(["a"]), texts(["b"], "words")]), "words"),
    "an input twice": (request([texts(["a"]), texts(["b"])]), "name"),
    "no inputs": (request([]), "text"),
    "no rows": (request([texts([])]), "text"),
    "an output that there is not": (request([texts(["a"])], ["hidden"]), "hidden"),
    "a customer too few": (request([texts(["a", "b"]), texts(["acme"], "customer")]), "customers"),
    "typed and raw": (both(), "raw_input_contents"),
    "raw that ends within a size": (raw_request([("text", "BYTES", [1], b"\x01")]), "length"),
    "raw with a size too large": (raw_request([("text", "BYTES", [1], b"\xff\xff\xff\xff" + b"a")]), "longer"),
    "raw with bytes left": (raw_request([("text", "BYTES", [1], TWO + b"abc")]), "text"),
    "raw with a text more": (raw_request([("text", "BYTES", [1], raw_texts(["a", "b"]))]), "shape"),
    "raw numbers too short": (raw_request([("input_ids", "INT64", [1, 2], b"\x00" * 15)]), "15 bytes"),
    "a negative id": (request([tensor("input_ids", "INT64", [1, 1], int64_contents=[-1])]), "input_ids"),
    "an id that the model has no row for": (
        request([tensor("input_ids", "INT64", [1, 1], int64_contents=[2**40])]),
        "input_ids",
    ),
    "a parameter of another type": (request([texts(["a"])]), "customer"),
}
LIES["a parameter of another type"][0].parameters["customer"].int64_param = 7
_ELSEWHERE = request([texts(["a"])])
_ELSEWHERE.inputs[0].parameters["shared_memory_region"].string_param = "region"
LIES["a tensor that is elsewhere"] = (_ELSEWHERE, "shared_memory_region")
_HALF = request([texts(["a"])], ["logits"])
_HALF.parameters["datatype"].string_param = "FP16"
LIES["half precision that is not raw"] = (_HALF, "FP16")
_FEWER_RAW = raw_request([("text", "BYTES", [1], raw_texts(["a"])), ("customer", "BYTES", [1], raw_texts(["acme"]))])
del _FEWER_RAW.raw_input_contents[1]
LIES["fewer raw elements than inputs"] = (_FEWER_RAW, "raw_input_contents")


def test_lies_end_in_invalid_argument(service: InferenceService) -> None:
    async def ask(client: Client) -> dict[str, grpc.aio.AioRpcError]:
        return {name: await client.error(sent) for name, (sent, _) in LIES.items()}

    for name, error in asking(service, ask).items():
        assert error.code() == INVALID, f"{name}: {error.code()} {error.details()}"
        assert LIES[name][1] in error.details() and "\n" not in error.details(), f"{name}: {error.details()}"


def test_damaged_messages_end_in_a_status_of_the_clients(
    service: InferenceService, caplog: pytest.LogCaptureFixture
) -> None:
    two = ["one", "two"]
    wholes = [
        request([texts(two), texts(["acme", "beta"], "customer")], ["logits"], id="1").SerializeToString(),
        raw_request(
            [("text", "BYTES", [2], raw_texts(two)), ("text_pair", "BYTES", [2], raw_texts(two))]
        ).SerializeToString(),
        request(
            [tensor("input_ids", "INT64", [2, 3], int64_contents=range(1, 7))], customer="beta"
        ).SerializeToString(),
    ]
    chance = random.Random(3)
    sent = [damaged_bytes(chance.choice(wholes), chance) for _ in range(DAMAGES)]

    async def ask(client: Client) -> list[Any]:
        found = []
        for body in sent:
            try:
                await client.infer(body)
                found.append(grpc.StatusCode.OK)
            except grpc.aio.AioRpcError as error:
                found.append(error.code())
        return found

    found = asking(service, ask)
    strange = [(body, code) for body, code in zip(sent, found, strict=True) if code not in EXPECTED]
    assert not strange and found.count(INVALID) > DAMAGES / 10 and not caplog.records


EXPECTED = (grpc.StatusCode.OK, INVALID, NOT_FOUND)
