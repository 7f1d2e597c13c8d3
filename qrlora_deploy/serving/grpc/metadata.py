"""What a call brings beside its message, and what a refusal gives back."""

import time
from typing import Any

import grpc

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.refusals import status_of

RETRY_AFTER = "retry-after"
"""Seconds, in the trailing metadata of a refusal that is worth another try: as the header of that name over HTTP."""

PUSHBACK = "grpc-retry-pushback-ms"
"""The same in milliseconds, as gRPC's own retries read it."""


def value_of(context: grpc.aio.ServicerContext, name: str) -> str | None:
    """The first value of a name in a call's metadata; None where there is none, or one that is no text."""
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else None
    return None


def key_of_call(context: grpc.aio.ServicerContext) -> str | None:
    """The key in `authorization: Bearer KEY`; None where there is none."""
    scheme, _, key = (value_of(context, "authorization") or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def deadline_of(context: grpc.aio.ServicerContext) -> float | None:
    """The time of `time.monotonic` after which the client does not wait; None where it gave none."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


async def refuse(context: grpc.aio.ServicerContext, error: QrloraError) -> Any:
    """End a call by an error's status and its one line.

    Raises:
        grpc.aio.AbortError: always; gRPC ends the call by it.
    """
    again_s = getattr(error, "retry_after_s", None)
    trailing = () if again_s is None else ((RETRY_AFTER, f"{again_s:g}"), (PUSHBACK, str(round(again_s * 1000))))
    await context.abort(grpc.StatusCode[status_of(error).grpc], str(error), trailing)
