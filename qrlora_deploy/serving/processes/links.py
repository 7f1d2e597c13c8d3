"""Connections between the processes of a server: frames, which are written together once a turn of the event loop."""

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import Any, cast

import orjson

from qrlora_deploy.errors import QrloraError

HEAD = struct.Struct("<IBQ")
"""Of a frame: bytes of its payload, what it is, and the number that a question and its answer have in common."""

MAX_FRAME_BYTES = 2**31
"""A payload that claims more is none: the peer is broken."""

logger = logging.getLogger(__name__)


class BrokenFrameError(QrloraError):
    """What another process sent is no frame, or not what its kind says."""


class Link(asyncio.Protocol):
    """One end of a connection between two processes. It belongs to one event loop.

    Args:
        received: called with each frame: this link, its kind, its number, its payload. Whatever it raises ends the
            connection, and nothing else.
        lost: called once when the connection has ended.
        made: called when it has begun.
    """

    def __init__(
        self,
        received: "Callable[[Link, int, int, bytearray], None]",
        lost: "Callable[[Link], None]",
        made: "Callable[[Link], None]" = lambda link: None,
    ) -> None:
        self._received, self._lost, self._made = received, lost, made
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._read = bytearray()
        self._to_write: list[bytes] = []

    def send(self, kind: int, number: int = 0, *payload: bytes) -> None:
        """Send a frame; nothing where the connection has ended."""
        if not self._to_write:
            self._loop.call_soon(self._write)
        self._to_write += (HEAD.pack(sum(map(len, payload)), kind, number), *payload)

    def send_record(self, kind: int, number: int, record: Any) -> None:
        """Send a frame whose payload is JSON."""
        self.send(kind, number, orjson.dumps(record))

    def close(self) -> None:
        """End, once everything was written."""
        self._write()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The other end is there."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other end has gone."""
        self._transport = None
        self._to_write.clear()
        self._lost(self)

    def data_received(self, data: bytes) -> None:
        """Some bytes: frames are handed on as they get whole."""
        self._read += data
        begin = 0
        try:
            while (end := self._end_of_frame(begin)) <= len(self._read):
                _, kind, number = HEAD.unpack_from(self._read, begin)
                payload = self._read[begin + HEAD.size : end]
                begin = end
                self._received(self, kind, number, payload)
        except Exception as error:
            logger.error("a process of this server sent what cannot be read: %s", error)
            self._abort()
        del self._read[:begin]

    def _end_of_frame(self, begin: int) -> int:
        """Where the frame at `begin` ends; beyond what was read where that is not known yet."""
        if len(self._read) < begin + HEAD.size:
            return len(self._read) + 1
        size = HEAD.unpack_from(self._read, begin)[0]
        if size > MAX_FRAME_BYTES:
            raise BrokenFrameError(f"a frame of {size} bytes; it may have {MAX_FRAME_BYTES}")
        return int(begin + HEAD.size + size)

    def _write(self) -> None:
        if self._transport is not None and self._to_write:
            self._transport.write(b"".join(self._to_write))
        self._to_write.clear()

    def _abort(self) -> None:
        self._read.clear()
        if self._transport is not None:
            self._transport.abort()


def record_of(payload: bytearray) -> Any:
    """The JSON of a frame.

    Raises:
        BrokenFrameError: it is none.
    """
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise BrokenFrameError(f"a frame that should be JSON: {error}") from error
