"""What is asked of a server, as HTTP has it; who sends it is the caller's affair."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np

from qrlora_deploy.client.answers import parse_object
from qrlora_deploy.client.errors import BadAnswerError, DeadlineError, ServerError, UnreachableError, error_class
from qrlora_deploy.client.tensors import Input, as_array, datatype_of, to_binary
from qrlora_deploy.errors import MalformedInputError, first_line

HEADER_LENGTH = "Inference-Header-Content-Length"
TIMEOUT = "X-Request-Timeout-Ms"

CONNECT_S = 5.0
"""Longer no connection is waited for: another try may reach another server."""


@dataclass(frozen=True)
class Call:
    """A request.

    Attributes:
        path: of the URL.
        body: what is sent.
        headers: beside those of each request.
    """

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def classify_call(
    texts: Sequence[str],
    customer: str | None = None,
    customers: Sequence[str | None] | None = None,
    pairs: Sequence[str] | None = None,
    model: str | None = None,
) -> Call:
    """`POST /v1/classify`.

    Raises:
        MalformedInputError: a text is none.
    """
    if isinstance(texts, str) or isinstance(pairs, str):
        raise MalformedInputError("texts must be a list of texts, not one text")
    fields: dict[str, Any] = {"texts": list(texts), "customer": customer, "model": model}
    fields["customers"] = None if customers is None else list(customers)
    fields["pairs"] = None if pairs is None else list(pairs)
    body = _json({name: value for name, value in fields.items() if value is not None})
    return Call("/v1/classify", body, {"Content-Type": "application/json"})


def infer_call(
    model: str,
    inputs: Mapping[str, Input],
    customer: str | None = None,
    outputs: Sequence[str] | None = None,
    binary: bool = True,
    request_id: str = "",
) -> Call:
    """`POST /v2/models/MODEL/infer`, by JSON or with the binary extension.

    Raises:
        MalformedInputError: an input is no tensor of the protocol.
    """
    arrays = {name: as_array(name, value) for name, value in inputs.items()}
    parameters: dict[str, Any] = {"binary_data_output": binary}
    record: dict[str, Any] = {"parameters": parameters | ({"customer": customer} if customer is not None else {})}
    if request_id:
        record["id"] = request_id
    if outputs is not None:
        record["outputs"] = [{"name": name} for name in outputs]
    pieces = [to_binary(array) for array in arrays.values()] if binary else []
    record["inputs"] = [_tensor(name, array, binary) for name, array in arrays.items()]
    for item, piece in zip(record["inputs"], pieces, strict=False):
        item["parameters"] = {"binary_data_size": len(piece)}
    head = _json(record)
    path = f"/v2/models/{quote(model, safe='')}/infer"
    if not binary:
        return Call(path, head, {"Content-Type": "application/json"})
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return Call(path, b"".join([head, *pieces]), headers)


def _tensor(name: str, array: np.ndarray, binary: bool) -> dict[str, Any]:
    record = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
    return record if binary else record | {"data": array.ravel().tolist()}


def _json(record: Any) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise MalformedInputError("a text holds half of a surrogate pair") from error
    except (TypeError, ValueError) as error:
        raise MalformedInputError(f"the request cannot be written as JSON: {first_line(error)}") from error


def timed(call: Call, left_s: float | None) -> tuple[dict[str, str], httpx.Timeout]:
    """Headers and time-outs of a try with so many seconds left: the server is told, so that it runs nothing in vain."""
    if left_s is None:
        return dict(call.headers), httpx.Timeout(None, connect=CONNECT_S)
    headers = {**call.headers, TIMEOUT: str(max(1, math.ceil(left_s * 1000)))}
    return headers, httpx.Timeout(left_s, connect=min(left_s, CONNECT_S))


def error_of(reply: httpx.Response, body: bytes) -> ServerError | None:
    """The error that a reply is; None where it is an answer."""
    if reply.is_success:
        return None
    try:
        message = str(parse_object(body)["error"])
    except (BadAnswerError, KeyError):
        message = f"the server answered {reply.status_code} {reply.reason_phrase}".strip()
    kind = error_class(reply.status_code)
    request_id = reply.headers.get("x-request-id", "")
    return kind(message, reply.status_code, request_id, retry_after(reply.headers.get("retry-after")))


def retry_after(text: str | None) -> float | None:
    """Seconds that a header Retry-After asks to wait; None where it says nothing that can be read."""
    if text is None:
        return None
    try:
        seconds = float(text) if text.strip().isdecimal() else parsedate_to_datetime(text).timestamp() - time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def transport_error(error: httpx.RequestError, url: str) -> ServerError:
    """What httpx says of a connection, as one of ours."""
    if not isinstance(error, httpx.TransportError):
        return BadAnswerError(f"the answer of {url} cannot be read: {first_line(error)}")
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return DeadlineError(f"{url} did not answer in time; give more by deadline_s")
    if isinstance(error, httpx.UnsupportedProtocol | httpx.ProxyError):
        return ServerError(f"{url} cannot be asked: {first_line(error)}")
    return UnreachableError(f"{url} cannot be reached: {first_line(error)}")
