"""Compression of bodies, gzip and deflate, both ways and bounded. Pure: bytes in, bytes out."""

import zlib
from functools import lru_cache

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.serving.refusals import TooLargeError

GZIP, ZLIB, RAW = 31, 15, -15
"""What zlib calls the forms: "deflate" means the second by its definition, and the third to some clients."""

LEVEL = 1
"""Fast: text and JSON shrink to a third anyhow."""

MEMBERS = 256
"""Parts of a gzip body, each of which costs a call."""

WORTH_BYTES = 1024
"""Shorter replies go as they are."""


def check_encoding(encoding: str) -> str:
    """A request's `Content-Encoding`: "gzip", "deflate", or empty for none.

    Raises:
        MalformedInputError: it is another one.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return ""
    if name not in ("gzip", "deflate"):
        raise MalformedInputError(f"Content-Encoding must be gzip or deflate, not {encoding!r:.40}")
    return name


def inflated(body: bytes, encoding: str, limit: int) -> bytes:
    """A body as it was before it was compressed.

    Never makes more than `limit` bytes, whatever the body says.

    Raises:
        MalformedInputError: it is damaged or cut.
        TooLargeError: it would become longer.
    """
    form = GZIP if encoding == "gzip" else ZLIB if _is_zlib(body) else RAW
    pieces: list[bytes] = []
    left = limit
    while body:
        if len(pieces) == MEMBERS:
            raise MalformedInputError(f"the body has more than {MEMBERS} gzip members; send one")
        stream = zlib.decompressobj(form)
        try:
            piece = stream.decompress(body, left + 1)
        except zlib.error as error:
            raise MalformedInputError(f"the body is not {encoding}: {error}") from error
        left -= len(piece)
        if left < 0:
            raise TooLargeError(f"the body becomes longer than {limit} bytes; send fewer rows at a time")
        if not stream.eof:
            raise MalformedInputError(f"the body ends within its {encoding} data")
        pieces.append(piece)
        # A gzip file may have several members.
        body = stream.unused_data
    return b"".join(pieces)


def _is_zlib(body: bytes) -> bool:
    return len(body) >= 2 and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0


@lru_cache(maxsize=256)
def chosen(accepted: str) -> str:
    """What a reply is compressed by, of what a client's `Accept-Encoding` takes; empty: by nothing."""
    offers = {}
    for part in accepted.lower().split(","):
        name, _, weight = part.partition(";")
        offers[name.strip()] = weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return next((name for name in ("gzip", "deflate") if offers.get(name)), "")


def deflated(body: bytes, encoding: str) -> bytes:
    """A body, compressed."""
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, GZIP if encoding == "gzip" else ZLIB)
    return stream.compress(body) + stream.flush()
