"""What goes between a front and a replica: a request of HTTP and its answer, whole."""

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
