"""A call: what it brings beside its message, and how it is refused."""

import logging
import re
import time
import traceback
from collections.abc import Sequence

import grpc

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.access import Access, key_of
from qrlora_deploy.serving.answering import FAILED
from qrlora_deploy.serving.parts import Spans, Tracing
from qrlora_deploy.serving.refusals import FAILED as FAILED_STATUS
from qrlora_deploy.serving.refusals import GONE, STATUS, retry_after_of, status_of
from qrlora_deploy.serving.request_ids import new_request_id

REQUEST_ID = "x-request-id"
"""A client may send it; it comes back in the trailing metadata, and stands in the log."""

GOOD_ID = re.compile(r"[\x21-\x7e]{1,128}")

RETRY_AFTER = "retry-after"
"""Seconds, in the trailing metadata of a refusal that is worth another try: as the header of that name over HTTP."""

PUSHBACK = "grpc-retry-pushback-ms"
"""The same in milliseconds, as gRPC's own retries read it."""

CALL_STATUS = {"": "OK", GONE: "CANCELLED"}
"""gRPC's status of what ended without an error of ours, by the reason."""

Metadata = Sequence[tuple[str, str | bytes]] | None

logger = logging.getLogger(__name__)


def value_in(metadata: Metadata, name: str) -> str | None:
    """The first value of a name; None where there is none, or one that is no text."""
    for key, value in metadata or ():
        if key == name:
            return value if isinstance(value, str) else None
    return None


def key_in(metadata: Metadata) -> str | None:
    """The key in `authorization: Bearer KEY`."""
    return key_of(value_in(metadata, "authorization"))


class Call:
    """A call that is being answered.

    Attributes:
        access: of the key that came with it.
        deadline_s: a time of `time.monotonic` after which the client does not wait; None: it waits for ever.
        request_id: the client's own, or one made up.
        customers: of the rows that it asks for.
        spans: are told of its stages; None: nobody wants to know.
    """

    def __init__(self, context: grpc.aio.ServicerContext, access: Access) -> None:
        self._context = context
        remaining_s = context.time_remaining()
        self.deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        given = value_in(context.invocation_metadata(), REQUEST_ID) or ""
        self.request_id = given if GOOD_ID.fullmatch(given) else new_request_id()
        self.access = access
        self.customers: Sequence[str | None] = ()
        self.spans: Spans | None = None
        context.set_trailing_metadata(((REQUEST_ID, self.request_id),))

    def begin_spans(self, tracing: Tracing, method: str) -> None:
        """Begin its spans, with the names of OpenTelemetry's conventions.

        Args:
            tracing: begins them.
            method: its full name.
        """
        carrier = {name: value for name, value in self._context.invocation_metadata() or () if isinstance(value, str)}
        attributes = {"rpc.system.name": "grpc", "rpc.method": method, "qrlora.request_id": self.request_id}
        self.spans = tracing.begin(method, carrier, attributes)

    def end_spans(self, reason: str, code: int) -> None:
        """End them.

        Args:
            reason: why the call was not answered; empty: it was.
            code: that HTTP has for the same.
        """
        if self.spans is not None:
            status = CALL_STATUS.get(reason) or STATUS.get(reason, FAILED_STATUS).grpc
            self.spans.end(reason, code >= 500, {"rpc.response.status_code": status})

    async def refuse(self, error: QrloraError) -> None:
        """End it by an error's status and its one line.

        Raises:
            grpc.aio.AbortError: always; gRPC ends the call by it.
        """
        trailing = [(REQUEST_ID, self.request_id)]
        again_s = retry_after_of(error)
        if again_s is not None:
            trailing += [(RETRY_AFTER, f"{again_s:g}"), (PUSHBACK, str(round(again_s * 1000)))]
        await self._context.abort(grpc.StatusCode[status_of(error).grpc], str(error), tuple(trailing))

    def refusal_of(self, error: Exception) -> QrloraError:
        """The error that the client is told of; what is none of ours is logged, without what a client sent."""
        if isinstance(error, QrloraError):
            return error
        # The message of a foreign exception may hold a customer's text; where it came from holds none.
        place = "".join(traceback.format_tb(error.__traceback__))
        logger.error("request %s: %s\n%s", self.request_id, type(error).__name__, place)
        return QrloraError(FAILED)
