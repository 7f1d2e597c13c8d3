"""Logs as lines of JSON: one object a line, whatever is in it; never a key, never a text of a customer."""

import logging
import sys
from datetime import UTC, datetime
from typing import IO, Any

import orjson

from qrlora_deploy.errors import shortened

FIELDS = "fields"
"""The attribute of a log record that holds what stands beside its message."""

LIBRARIES = ("uvicorn", "grpc", "asyncio")
"""Loggers of what a server is made of: their lines are among its own."""

MAX_ID = 128
"""Characters of a request's id, which a client may choose."""

_access = logging.getLogger("qrlora_deploy.access")


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON: time, level, logger, message, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = {
            "time": time_text(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": shortened(record.getMessage()),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json_line(line)


def json_line(record: dict[str, Any]) -> str:
    """A record as JSON on one line; what is no JSON becomes text, and half of a character is written out."""
    try:
        return orjson.dumps(record, default=str).decode()
    except TypeError:
        clean = {name: _clean(value) for name, value in record.items()}
        return orjson.dumps(clean, default=str).decode()


def _clean(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else repr(value)


def time_text(seconds: float) -> str:
    """A time since 1970 in ISO 8601, UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def log_as_json(stream: IO[str] | None = None, level: int = logging.INFO) -> logging.Handler:
    """Write what the package and `LIBRARIES` log as lines of JSON, the access log among it.

    Args:
        stream: where to; None: stderr.
        level: from which on.

    Returns:
        The handler, which belongs to their loggers until it is removed.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("qrlora_deploy")
    logger.addHandler(handler)
    logger.setLevel(level)
    # Otherwise a handler of the root would write each line once more.
    logger.propagate = False
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    return handler


def log_plainly() -> None:
    """Write the warnings and errors that the package logs as plain lines to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("qrlora_deploy")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False


def log_request(
    request_id: str,
    method: str,
    route: str,
    status: int,
    seconds: float,
    rows: int = 0,
    key_id: str = "",
    trace_id: str = "",
) -> None:
    """Write a line of the access log.

    Args:
        request_id: of the request, by which a client finds it; it is cut.
        method: of HTTP, or "grpc".
        route: its pattern, such as `/v2/models/{model}/infer`, so that nothing a client wrote gets into the log.
        status: code of the answer.
        seconds: it took.
        rows: that it had.
        key_id: of the key that came with it, which is no secret.
        trace_id: of the trace that has the request's spans; empty: there are none.
    """
    if not _access.isEnabledFor(logging.INFO):
        return
    fields = {
        "request_id": request_id[:MAX_ID],
        "method": method,
        "route": route,
        "status": status,
        "seconds": round(seconds, 6),
        "rows": rows,
    }
    if key_id:
        fields["key_id"] = key_id
    if trace_id:
        fields["trace_id"] = trace_id
    _access.info("request", extra={FIELDS: fields})
