"""What goes between a front and a replica: a request of HTTP and its answer, whole or as it comes."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Call:
    """A request on its way to a replica.

    Attributes:
        method: of HTTP.
        path: as ASGI has it.
        headers: names in lower case.
        body: uncompressed.
        customer: decides which replica has it; None: the one with the least to do.
        avoid: replicas that have refused it.
    """

    method: str
    path: str
    headers: Headers = ()
    body: bytes = b""
    customer: str | None = None
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What a replica answers.

    Attributes:
        replica: that answered.
        status: of HTTP.
        headers: names in lower case.
        body: uncompressed.
        refusal: `QrloraError.kind` of the error that it ended with; None: it was answered.
        customers: of the rows, one for each.
    """

    replica: str
    status: int
    headers: Headers
    body: bytes
    refusal: str | None = None
    customers: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Part:
    """What follows of an answer that comes in parts, behind its `Reply` with the beginning.

    Attributes:
        body: some of it, uncompressed.
        refusal: as of the `Reply`, where it is known only now.
    """

    body: bytes
    refusal: str | None = None


@dataclass(frozen=True)
class Begun:
    """An answer that has begun.

    Attributes:
        reply: its beginning.
        rest: what follows; whoever has it reads it to the end or closes it.
    """

    reply: Reply
    rest: AsyncGenerator[Part]


async def begin(parts: AsyncGenerator[Reply | Part]) -> Begun:
    """Wait for the beginning of an answer, the first of its parts."""
    try:
        reply = await anext(parts)
    except BaseException:
        await parts.aclose()
        raise
    assert isinstance(reply, Reply)
    return Begun(reply, _rest(parts))


async def _rest(parts: AsyncGenerator[Reply | Part]) -> AsyncGenerator[Part]:
    async with aclosing(parts):
        async for part in parts:
            assert isinstance(part, Part)
            yield part
