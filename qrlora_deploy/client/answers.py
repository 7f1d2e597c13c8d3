"""What a server answers, and reading it: nothing of it is believed to have the right form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qrlora_deploy.client.errors import BadAnswerError
from qrlora_deploy.client.tensors import from_binary, from_json


@dataclass(frozen=True)
class Answer:
    """What the model says of a text.

    Attributes:
        label: the most likely one.
        score: its probability; of a regression the value.
        labels: all that apply, of a model with several labels a text.
        customer: whose answer it is; None: the base's.
        customer_digest: of the content of the customer that answered; empty for the base.
    """

    label: str
    score: float
    labels: tuple[str, ...] = ()
    customer: str | None = None
    customer_digest: str = ""


@dataclass(frozen=True)
class Inference:
    """An answer of the Open Inference Protocol.

    Attributes:
        outputs: by name; numbers in the dtype that was sent, texts as an array of `str` objects.
        model: its name.
        id: of the request, as it was given.
        parameters: what the server says beside the outputs, such as digests.
    """

    outputs: Mapping[str, np.ndarray]
    model: str
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


def read_answers(body: bytes, count: int) -> list[Answer]:
    """The answers of `/v1/classify` to so many texts.

    Raises:
        BadAnswerError: it is none of it, or holds another number of them.
    """
    record = parse_object(body)
    try:
        answers = [_answer(item) for item in record["answers"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _bad("its answers have another form") from error
    if len(answers) != count:
        raise _bad(f"it holds {len(answers)} answers to {count} texts")
    return answers


def _answer(item: Mapping[str, Any]) -> Answer:
    label, customer, digest = item["label"], item.get("customer"), item.get("customer_digest", "")
    if not (isinstance(label, str) and isinstance(customer, str | None) and isinstance(digest, str)):
        raise TypeError
    return Answer(label, float(item["score"]), tuple(map(str, item.get("labels", ()))), customer, digest)


def read_inference(body: bytes, header_length: str | None) -> Inference:
    """The answer of `/v2/models/MODEL/infer`.

    Args:
        body: JSON, with the bytes of tensors behind it or without.
        header_length: bytes of the JSON, from the header `Inference-Header-Content-Length`; None: all.

    Raises:
        BadAnswerError: it is none of it.
    """
    try:
        end = len(body) if header_length is None else int(header_length)
        record, rest = parse_object(body[:end]), memoryview(body)[end:]
        outputs, start = {}, 0
        for item in record["outputs"]:
            size = item.get("parameters", {}).get("binary_data_size")
            if size is None:
                outputs[item["name"]] = from_json(item["datatype"], item["shape"], item["data"])
                continue
            outputs[item["name"]] = from_binary(item["datatype"], item["shape"], rest[start : start + size])
            start += size
        parameters = dict(record.get("parameters") or {})
        return Inference(outputs, str(record.get("model_name", "")), str(record.get("id", "")), parameters)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _bad("its outputs have another form") from error


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        BadAnswerError: it is none.
    """
    try:
        record = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _bad("it is not JSON") from error
    if not isinstance(record, dict):
        raise _bad("it is no JSON object")
    return record


def _bad(why: str) -> BadAnswerError:
    return BadAnswerError(f"the server's answer cannot be read: {why}; is the address that of a qrlora-deploy server?")
