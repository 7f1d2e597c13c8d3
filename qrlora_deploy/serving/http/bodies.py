"""Reading of bodies beside the event loop where they are long."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

T = TypeVar("T")

LONG_BODY = 1 << 18
"""Bytes from which a body is read in a thread; a shorter one takes less time than the way to a thread and back."""


async def body_of(request: Request) -> bytes:
    """A request's body, which the guard gives in one message.

    Raises:
        RefusalError: as `Guard` says.
    """
    body: bytes = (await request.receive())["body"]
    return body


async def parsed(body: bytes, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of a body.

    A long body is read in a thread, so that others are answered between the steps of its reading. A single call into
    C, such as that of the JSON parser, still holds the interpreter while it runs.

    Raises:
        Exception: whatever `parse` raises.
    """
    return parse(body) if len(body) < LONG_BODY else await asyncio.to_thread(parse, body)
