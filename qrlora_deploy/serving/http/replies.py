"""Replies: JSON, and the error body of the protocol with the status of each kind of error."""

import logging
import math
import traceback
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.refusals import retry_after_of, status_of

JSON = "application/json"
INTERNAL = "the server failed to answer; its log has the reason under this request's x-request-id"

logger = logging.getLogger(__name__)


class Whole(Response):
    """A reply that is there as bytes. starlette's own takes several times as long to make and to send.

    Args:
        body: of it.
        code: status.
        media_type: of the body, with its charset where it has one.
    """

    def __init__(self, body: bytes, code: int = 200, media_type: str = JSON) -> None:
        self.status_code, self.body, self.background = code, body, None
        self.raw_headers = [(b"content-type", media_type.encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; what is around the application says how long it is."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})


def json_reply(record: Any, code: int = 200) -> Response:
    """A record as JSON; arrays become lists."""
    return Whole(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY), code)


def error_reply(message: str, code: int, retry_after_s: float | None = None) -> Response:
    """`{"error": "..."}`, and when to come again."""
    reply = json_reply({"error": message}, code)
    if retry_after_s is not None:
        reply.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if code == 401:
        reply.headers["www-authenticate"] = "Bearer"
    return reply


def reply_to_error(error: Exception, request_id: str) -> Response:
    """The reply for what a request ended with. What is none of our errors is logged, without what a client sent."""
    if isinstance(error, QrloraError):
        return error_reply(str(error), status_of(error).http, retry_after_of(error))
    # The message of a foreign exception may hold a customer's text; where it came from holds none.
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s: %s\n%s", request_id, type(error).__name__, place)
    return error_reply(INTERNAL, 500)
