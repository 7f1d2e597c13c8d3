"""Clients that are slow, broken, or gone before their answer: a server has to bear them, and nobody checks theirs."""

import argparse
import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

from benchmarks.server_soak.place import Known, Place
from benchmarks.server_soak.questions import Asker, Question
from benchmarks.server_soak.told import Told, now

AT_ONCE = 60
HOLD_S = 4.0

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Way = Callable[[Streams, list[Question]], Awaitable[None]]


async def says_nothing(streams: Streams, questions: list[Question]) -> None:
    """Connects, and waits."""
    await asyncio.sleep(HOLD_S)


async def half_a_head(streams: Streams, questions: list[Question]) -> None:
    """Goes within its headers."""
    await _write(streams, b"POST /v1/classify HTTP/1.1\r\nHost: s\r\nX-Half: ")


async def half_a_body(streams: Streams, questions: list[Question]) -> None:
    """Goes within its body."""
    await _write(streams, questions[0].request[:-10])
    await asyncio.sleep(0.05)


async def no_http(streams: Streams, questions: list[Question]) -> None:
    """Speaks another language."""
    await _write(streams, bytes(range(256)) * 8)
    await _read(streams)


async def long_head(streams: Streams, questions: list[Question]) -> None:
    """Sends headers without an end."""
    await _write(streams, b"GET /v2 HTTP/1.1\r\nX: " + b"x" * 100_000)
    await _read(streams)


async def does_not_wait(streams: Streams, questions: list[Question]) -> None:
    """Asks, and goes."""
    await _write(streams, questions[0].request)


async def many_and_gone(streams: Streams, questions: list[Question]) -> None:
    """Asks for much, and resets the connection in the middle of it."""
    await _write(streams, b"".join(question.request for question in questions))
    await asyncio.sleep(0.01)
    reset = struct.pack("ii", 1, 0)
    streams[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)


async def byte_by_byte(streams: Streams, questions: list[Question]) -> None:
    """Takes seconds to send."""
    request = questions[0].request
    for start in range(0, len(request), 8):
        await _write(streams, request[start : start + 8])
        await asyncio.sleep(0.03)
    await _read(streams)


async def does_not_read(streams: Streams, questions: list[Question]) -> None:
    """Asks for more and more, and takes no answer for a while."""
    await _write(streams, b"".join(question.request for question in questions) * 4)
    await asyncio.sleep(HOLD_S)


WAYS: tuple[Way, ...] = (
    says_nothing,
    half_a_head,
    half_a_body,
    no_http,
    long_head,
    does_not_wait,
    many_and_gone,
    byte_by_byte,
    does_not_read,
)


async def _write(streams: Streams, data: bytes) -> None:
    streams[1].write(data)
    await asyncio.wait_for(streams[1].drain(), HOLD_S)


async def _read(streams: Streams) -> None:
    await asyncio.wait_for(streams[0].read(4096), HOLD_S)


async def broken(place: Place, way: Way, port: int, questions: list[Question], told: Told) -> None:
    """One such client."""
    writer = None
    try:
        streams = await asyncio.open_connection("127.0.0.1", port)
        writer = streams[1]
        await way(streams, questions)
    except (OSError, TimeoutError):
        pass
    finally:
        if writer is not None:
            writer.close()
        told.add(f"broken client: {way.__name__}")


async def run(place: Place, rate: float, seconds: float) -> None:
    """So many a second, for so long; one in ten meets the port of gRPC."""
    random, told = np.random.default_rng(0), Told(place.folder / "told" / "broken.json")
    questions = Asker(Known.of(place.folder), 99).questions(400)
    start_s, clients = now(), set[asyncio.Task[None]]()
    while now() < start_s + seconds:
        ports = json.loads(place.address.read_text())
        port = ports["grpc" if random.random() < 0.1 else "http"]
        some = [questions[number] for number in random.integers(len(questions), size=12)]
        if len(clients) < AT_ONCE:
            client = asyncio.create_task(broken(place, WAYS[int(random.integers(len(WAYS)))], port, some, told))
            clients.add(client)
            client.add_done_callback(clients.discard)
        await asyncio.sleep(1 / rate)
        told.write()
    for client in clients:
        client.cancel()
    told.write()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=15.0, help="clients a second")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    asyncio.run(run(Place(options.place), options.rate, options.seconds))


if __name__ == "__main__":
    main()
