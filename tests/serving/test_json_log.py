"""Logs as JSON: each line is an object, whatever a client or an error puts into it."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("orjson", reason="needs the extra serve")

from qrlora_deploy.serving.json_log import LIBRARIES, json_line, log_as_json, log_request


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What the package logs goes here."""
    logger = logging.getLogger("qrlora_deploy")
    before = logger.level, logger.propagate
    stream = io.StringIO()
    handler = log_as_json(stream)
    yield stream
    for name in (logger.name, *LIBRARIES):
        logging.getLogger(name).removeHandler(handler)
    logger.setLevel(before[0])
    logger.propagate = before[1]


def test_a_request_is_a_line(stream: io.StringIO) -> None:
    log_request("r-1", "POST", "/v1/classify", 200, 0.0123456789, rows=3, key_id="3f9a01c2b7d4")
    log_request("x" * 10_000, "GET", "/v2", 401, 0.001)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "qrlora_deploy.access",
        "message": "request",
        "request_id": "r-1",
        "method": "POST",
        "route": "/v1/classify",
        "status": 200,
        "seconds": 0.012346,
        "rows": 3,
        "key_id": "3f9a01c2b7d4",
    }
    assert len(second["request_id"]) == 128 and "key_id" not in second


def test_what_else_is_logged_is_a_line_too(stream: io.StringIO) -> None:
    logger = logging.getLogger("qrlora_deploy.serving.engine")
    logger.warning("two\nlines %s", "\x1b[31m")
    try:
        raise KeyError("gone")
    except KeyError:
        logger.exception("it failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["level"] == "warning" and "\n" not in first["message"] and "\x1b" not in first["message"]
    assert "KeyError: 'gone'" in second["exception"]


@pytest.mark.parametrize("name", ["uvicorn.error", "grpc._server", "asyncio"])
def test_what_a_servers_libraries_log_is_a_line_too(stream: io.StringIO, name: str) -> None:
    logging.getLogger(name).error("two\nlines")
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert (line["level"], line["logger"]) == ("error", name)


@settings(max_examples=200, deadline=None)
@given(text=st.text(), value=st.one_of(st.floats(), st.integers(), st.binary(), st.none(), st.lists(st.text())))
def test_every_record_becomes_one_line(text: str, value: object) -> None:
    line = json_line({"request_id": text, "value": value})
    assert "\n" not in line and "\r" not in line
    assert json.loads(line)["request_id"] == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters()))
def test_half_of_a_character_is_written_out(text: str) -> None:
    found = json.loads(json_line({"request_id": text + "\udc80"}))["request_id"]
    assert found == text.encode("utf-8", "backslashreplace").decode() + "\\udc80"
