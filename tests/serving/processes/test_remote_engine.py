"""An engine over a Unix socket says what it says to its own process, and a broken front harms nobody but itself."""

import asyncio
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("orjson", reason="needs the extra serve")

from qrlora_deploy.errors import InputError, MalformedInputError, QrloraError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer
from qrlora_deploy.serving.processes.engine_link import EngineLink, RemoteTicket
from qrlora_deploy.serving.processes.engine_socket import EngineSocket
from qrlora_deploy.serving.processes.links import HEAD, MAX_FRAME_BYTES
from qrlora_deploy.serving.processes.messages import ERRORS, Kind, pack_error, unpack_error
from qrlora_deploy.serving.processes.remote_engine import RemoteEngine
from qrlora_deploy.serving.refusals import DeadlineError, DrainingError, OverloadedError, QuotaError, TooLargeError
from tests.serving.engine.place import a_row, alone
from tests.tolerances import FP32_ONNX

DEADLINE_S = 20.0


@pytest.fixture
def engine(session: SwitchableSession, customers: dict[str, Coefficients]) -> Iterator[LocalEngine]:
    for name, customer in customers.items():
        session.load(name, customer)
    limits = Limits(max_queue_rows=8, customer_share=1.0)
    with LocalEngine(session, limits, Quotas({"beta": 1.0}, bursts={"beta": 2.0})) as engine:
        yield engine


class Place:
    """An engine's socket, and fronts that are connected to it."""

    def __init__(self, engine: LocalEngine, path: Path) -> None:
        self.engine, self.path = engine, path
        self.socket = EngineSocket({"tiny": engine}, path)

    async def front(self) -> tuple[EngineLink, RemoteEngine]:
        link = EngineLink(self.path)
        await link.start()
        return link, RemoteEngine([link], "tiny", self.engine.manifest)


@asynccontextmanager
async def listening(engine: LocalEngine, folder: Path) -> AsyncIterator[Place]:
    place = Place(engine, folder / "engine.sock")
    await place.socket.start()
    yield place
    await place.socket.stop()


def played(engine: LocalEngine, folder: Path, play: Callable[[Place], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(DEADLINE_S), listening(engine, folder) as place:
            await play(place)

    asyncio.run(whole())


async def admitted(remote: RemoteEngine, rows: list[Row], deadline_s: float | None = None) -> RemoteTicket:
    load = Load(len(rows), sum(row.length for row in rows), 10)
    ticket = remote.admit(load, [row.customer for row in rows], deadline_s)
    await ticket.pending
    return ticket


async def asked(remote: RemoteEngine, rows: list[Row]) -> list[RowAnswer]:
    return await asyncio.wrap_future(remote.submit(await admitted(remote, rows), rows))


async def has_room(place: Place, rows: int = 8) -> None:
    """Wait until so many rows can be admitted, and give them back."""
    while True:
        try:
            ticket = place.engine.admit(Load(rows, rows, rows), [None] * rows)
        except OverloadedError:
            await asyncio.sleep(0.01)
        else:
            place.engine.release(ticket)
            return


def test_answers_are_those_of_the_session(engine: LocalEngine, session: SwitchableSession, tmp_path: Path) -> None:
    rows = [a_row(length, name, length) for length, name in ((5, "acme"), (9, None), (3, "gamma"), (7, "delta"))]

    async def play(place: Place) -> None:
        _, remote = await place.front()
        for answer, row in zip(await asked(remote, rows), rows, strict=True):
            np.testing.assert_allclose(answer.logits, alone(session, row), **FP32_ONNX)
            assert len(answer.labels) == len(answer.logits)
        while remote.stats().rows < len(rows):
            await asyncio.sleep(0.01)
        assert remote.stats() == engine.stats()

    played(engine, tmp_path, play)


def test_refusals_come_as_they_are(engine: LocalEngine, tmp_path: Path) -> None:
    async def play(place: Place) -> None:
        _, remote = await place.front()
        with pytest.raises(TooLargeError, match="more than the 8"):
            await admitted(remote, [a_row(3)] * 9)
        held = await admitted(remote, [a_row(3)] * 6)
        with pytest.raises(OverloadedError) as caught:
            await admitted(remote, [a_row(3)] * 3)
        assert (caught.value.retry_after_s or 0) > 0
        remote.release(held)
        await has_room(place)
        with pytest.raises(DeadlineError):
            await admitted(remote, [a_row(3)], deadline_s=0.0)
        with pytest.raises(UnknownCustomerError):
            await asked(remote, [a_row(3, "nobody")])
        with pytest.raises(QuotaError):
            await asyncio.gather(*(asked(remote, [a_row(3, "beta")]) for _ in range(4)))
        ticket = await admitted(remote, [a_row(3, "acme")])
        with pytest.raises(MalformedInputError, match="not of the customers"):
            await asyncio.wrap_future(remote.submit(ticket, [a_row(3, "beta")]))
        with pytest.raises(InputError, match="once"):
            remote.submit(ticket, [a_row(3, "acme")])
        await has_room(place)

    played(engine, tmp_path, play)


def test_who_stops_to_wait_or_goes_gives_its_place_back(engine: LocalEngine, tmp_path: Path) -> None:
    async def play(place: Place) -> None:
        link, remote = await place.front()
        await admitted(remote, [a_row(3)] * 4)
        rows = [a_row(5, "acme")] * 4
        remote.submit(await admitted(remote, rows), rows).cancel()
        assert len(link.open) == 1
        link.close()
        await has_room(place)

    played(engine, tmp_path, play)


BROKEN = {
    "too long": HEAD.pack(MAX_FRAME_BYTES + 1, Kind.ADMIT, 1),
    "no kind": HEAD.pack(0, 99, 1),
    "an engine's kind": HEAD.pack(0, Kind.GRANTED, 1),
    "no JSON": HEAD.pack(3, Kind.ADMIT, 1) + b"{{{",
    "another record": HEAD.pack(2, Kind.ADMIT, 1) + b"{}",
    "no model": HEAD.pack(17, Kind.ADMIT, 1) + b'["x",{},[],null ]',
    "rows of nobody": HEAD.pack(0, Kind.SUBMIT, 77),
    "rows with a long head": HEAD.pack(8, Kind.SUBMIT, 1) + struct.pack("<II", 9999, 0),
    "rows without a head": HEAD.pack(2, Kind.SUBMIT, 1) + b"xx",
    "rows that are none": HEAD.pack(6, Kind.SUBMIT, 1) + struct.pack("<I", 2) + b"[]",
    "rows of other lengths": HEAD.pack(23, Kind.SUBMIT, 1) + struct.pack("<I", 19) + b'[["input_ids"],[5]]',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_front_that_breaks_the_rules_is_let_go(
    engine: LocalEngine, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    admit = b'["tiny",{"rows":1,"tokens":5,"size_bytes":9},[null],null]'

    async def play(place: Place) -> None:
        _, other = await place.front()
        reader, writer = await asyncio.open_unix_connection(place.path)
        writer.write(HEAD.pack(len(admit), Kind.ADMIT, 1) + admit + BROKEN[name])
        # What the engine said before; then the end.
        await reader.read()
        writer.close()
        assert len(await asked(other, [a_row(4, "acme")])) == 1
        await has_room(place)

    with caplog.at_level(logging.ERROR):
        played(engine, tmp_path, play)
    assert "cannot be read" in caplog.text and "Traceback" not in caplog.text


def test_requests_of_an_engine_that_goes_are_told_to_come_again(engine: LocalEngine, tmp_path: Path) -> None:
    async def play(place: Place) -> None:
        _, remote = await place.front()
        ticket = await admitted(remote, [a_row(3)])
        await place.socket.stop()
        while not remote.stats().draining:
            await asyncio.sleep(0.01)
        with pytest.raises(DrainingError) as caught:
            await asyncio.wrap_future(remote.submit(ticket, [a_row(3)]))
        assert caught.value.retry_after_s == 1.0
        with pytest.raises(DrainingError, match="is starting"):
            remote.admit(Load(1, 3, 3), [None])
        # It is reached again once it is there.
        await place.socket.start()
        while remote.stats().draining:
            await asyncio.sleep(0.01)
        assert len(await asked(remote, [a_row(3)])) == 1

    played(engine, tmp_path, play)


@pytest.mark.parametrize("kind", [QrloraError, *ERRORS.values()])
def test_errors_keep_their_class_and_their_line(kind: type[QrloraError]) -> None:
    error = unpack_error(bytearray(pack_error(kind("what is wrong"))))
    assert type(error) is kind and str(error) == "what is wrong"
