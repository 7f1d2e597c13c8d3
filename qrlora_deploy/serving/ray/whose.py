"""Whose a request is, read before it is parsed: it decides where the request goes, and nothing else.

What cannot be understood has no customer here; the replica that gets it says what is wrong.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.serving.http.protocol import parse_object
from qrlora_deploy.serving.inference.questions import CUSTOMER
from qrlora_deploy.serving.inference.tensors import LENGTH


def customer_of(body: bytes, header_length: str | None = None) -> str | None:
    """The first customer that a request names; the base's rows have none.

    Args:
        body: of any route that answers rows.
        header_length: `Inference-Header-Content-Length`, where the body has binary data.
    """
    head = int(header_length) if header_length and header_length.isdecimal() else len(body)
    try:
        record = parse_object(body[:head])
    except MalformedInputError:
        return None
    named = [record.get(CUSTOMER), *_listed(record.get("customers")), _of_model(record.get("model"))]
    return _first([*named, *_of_protocol(record, body[head:])])


def _of_model(name: Any) -> str | None:
    """Who is asked for text: `base:customer`."""
    return name.partition(":")[2] if isinstance(name, str) else None


def _of_protocol(record: Mapping[str, Any], binary: bytes) -> Iterable[Any]:
    parameters = record.get("parameters")
    if isinstance(parameters, dict):
        yield parameters.get(CUSTOMER)
    start = 0
    for tensor in _listed(record.get("inputs")):
        if not isinstance(tensor, dict):
            return
        asked = tensor.get("parameters")
        size = asked.get("binary_data_size", 0) if isinstance(asked, dict) else 0
        if type(size) is not int or size < 0:
            return
        if tensor.get("name") == CUSTOMER:
            yield from _flat(tensor.get("data"))
            yield from _elements(binary[start : start + size])
        start += size


def _elements(binary: bytes) -> Iterable[str]:
    """The texts of a tensor of BYTES."""
    start = 0
    while start + LENGTH.size <= len(binary):
        (size,) = LENGTH.unpack_from(binary, start)
        start += LENGTH.size
        yield binary[start : start + size].decode("utf-8", "replace")
        start += size


def _flat(data: Any) -> Iterable[Any]:
    for item in _listed(data):
        yield from _listed(item) if isinstance(item, list) else (item,)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _first(names: Iterable[Any]) -> str | None:
    return next((name for name in names if isinstance(name, str) and name), None)
