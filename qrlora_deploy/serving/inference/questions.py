"""From what a request holds to what is asked: texts or token ids, and whose each row is."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.serving.answering import Question, Texts, TokenIds
from qrlora_deploy.serving.inference.requests import InferRequest, Tensor

TEXT, PAIR, CUSTOMER = "text", "text_pair", "customer"
IDS = ("input_ids", "attention_mask", "token_type_ids")

INPUTS = {TEXT: "BYTES", PAIR: "BYTES", CUSTOMER: "BYTES"} | dict.fromkeys(IDS, "INT64")
"""Every input that a request may have, with its datatype."""

MAX_TIMEOUT_MS = 86_400_000


def question_of(request: InferRequest) -> tuple[Question, list[str | None]]:
    """What a request of the protocol asks, and the customer of each row.

    Raises:
        MalformedInputError: its inputs do not belong together.
    """
    inputs = request.inputs
    for name, tensor in inputs.items():
        if name not in INPUTS:
            raise MalformedInputError(f"there is no input {name!r:.60}; choose from {', '.join(INPUTS)}")
        if isinstance(tensor, list) != (INPUTS[name] == "BYTES"):
            raise MalformedInputError(f"the input {name} must have the datatype {INPUTS[name]}")
    question = _question(inputs)
    return question, _customers(request, len(question))


def _question(inputs: Mapping[str, Tensor]) -> Question:
    ids = {name: tensor for name in IDS if isinstance(tensor := inputs.get(name), np.ndarray)}
    if (TEXT in inputs) == bool(ids):
        raise MalformedInputError(f"give either the input {TEXT} or {', '.join(IDS)}")
    if ids and (IDS[0] not in ids or PAIR in inputs):
        raise MalformedInputError(f"token ids need {IDS[0]} and go without {PAIR}; put both texts into one row of ids")
    if ids:
        return TokenIds(ids)
    pair = inputs.get(PAIR)
    return Texts(_texts(inputs[TEXT]), None if pair is None else _texts(pair))


def _texts(tensor: Tensor) -> list[str]:
    return tensor if isinstance(tensor, list) else []


def _customers(request: InferRequest, rows: int) -> list[str | None]:
    one = request.parameters.get(CUSTOMER)
    each = request.inputs.get(CUSTOMER)
    if one is not None and each is not None:
        raise MalformedInputError("the customer is named by a parameter and by an input; use one of them")
    if each is not None:
        return owners(_texts(each), rows)
    if one is not None and not isinstance(one, str):
        raise MalformedInputError("the parameter customer must be a text")
    return [one or None] * rows


def owners(names: Sequence[str | None], rows: int) -> list[str | None]:
    """The customer of each row; an empty name is the base.

    Raises:
        MalformedInputError: there is another number of them.
    """
    if len(names) != rows:
        raise MalformedInputError(f"there are {rows} rows but {len(names)} customers; name one for each")
    return [name or None for name in names]


def deadline_of(header: str | None, microseconds: Any = None) -> float | None:
    """When a request's time is over, of `time.monotonic`.

    Args:
        header: `x-request-timeout-ms`.
        microseconds: the parameter `timeout`, as Triton's clients send it.

    Raises:
        MalformedInputError: one of them is no time.
    """
    limits = []
    if header is not None:
        if not (header.isascii() and header.isdecimal() and 0 < len(header) < 10):
            raise MalformedInputError("x-request-timeout-ms must be a whole number of milliseconds")
        limits.append(min(int(header), MAX_TIMEOUT_MS) / 1e3)
    if microseconds is not None:
        if type(microseconds) is not int or microseconds < 0:
            raise MalformedInputError("the parameter timeout must be a whole number of microseconds")
        if microseconds:  # 0 is Triton's word for none
            limits.append(min(microseconds, MAX_TIMEOUT_MS * 1000) / 1e6)
    return time.monotonic() + min(limits) if limits else None
