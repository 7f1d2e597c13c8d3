"""A client over HTTP: many connections that are kept, several requests on their way in each, every answer checked.

It speaks HTTP by hand, since a client library would take more of the cores than the server. What was not answered when
a server says that it closes a connection is asked again, as HTTP wants it; a connection that ends without a word while
requests are on their way has lost them.
"""

import argparse
import asyncio
import json
from collections import deque
from pathlib import Path

import uvloop

from benchmarks.server_soak.place import Known, Place
from benchmarks.server_soak.questions import BUSY, Asker, Question
from benchmarks.server_soak.told import Checker, Told, now

DEPTH = 4
"""Requests on their way in a connection, at most."""

TICK_S = 0.005
TELL_S = 1.0
AGAIN_S = 0.1
"""Before a busy server is asked again, and between two tries to connect."""

LATE_S = 60.0
"""A request without an answer for so long is lost."""


class Line(asyncio.Protocol):
    """A connection."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._read = b""
        self._is_closing = False
        self.transport: asyncio.Transport | None = None
        self.waiting: deque[tuple[Question, float]] = deque()

    @property
    def room(self) -> int:
        """How many requests may be sent now."""
        return 0 if self.transport is None or self._is_closing else DEPTH - len(self.waiting)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self.transport = transport  # type: ignore[assignment]

    def ask(self, questions: list[Question]) -> None:
        """Send requests, one behind the other."""
        assert self.transport is not None
        begun_s = now()
        self.waiting += [(question, begun_s) for question in questions]
        self.transport.write(b"".join(question.request for question in questions))

    def data_received(self, data: bytes) -> None:
        """Read the answers that are whole."""
        self._read += data
        while self._one_answer():
            pass

    def _one_answer(self) -> bool:
        end = self._read.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self._read[:end]
        lines = head.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        stop = end + 4 + length
        if len(self._read) < stop:
            return False
        body, self._read = self._read[end + 4 : stop], self._read[stop:]
        question, begun_s = self.waiting.popleft()
        self._is_closing = self._is_closing or b"connection: close" in lines
        self._client.answered(question, int(head[9:12]), head, body, begun_s)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """It has ended: by the server's word, or without one."""
        self.transport = None
        self._client.ended(self, [question for question, _ in self.waiting], self._is_closing, error)


class Client:
    """Asks at a rate over many connections.

    Args:
        place: of the soak.
        seed: of its questions.
        connections: that it keeps.
        rate: requests a second; where the server is slower it catches up afterwards.
    """

    def __init__(self, place: Place, seed: int, connections: int, rate: float) -> None:
        known = Known.of(place.folder)
        self._place, self._rate = place, rate
        self._questions = Asker(known, seed).questions(4000)
        self.told = Told(place.folder / "told" / f"http-{seed}.json")
        self._checker = Checker(known, place.replaced_s(), self.told)
        self._again: deque[Question] = deque()
        self._lines: list[Line] = []
        self._connections, self._next, self._busy_until_s, self._ends = connections, 0, 0.0, False

    async def run(self, seconds: float) -> None:
        """Ask for so long, and wait for what is on its way."""
        start_s, told_s, begun = now(), 0.0, 0
        keeping = [asyncio.create_task(self._keep()) for _ in range(self._connections)]
        while (left := now() < start_s + seconds) or self._on_its_way():
            due = int((now() - start_s) * self._rate) - begun if left else 0
            begun += self._send(due)
            if now() > told_s + TELL_S:
                self.told.write()
                told_s = now()
            if now() > start_s + seconds + LATE_S:
                break
            await asyncio.sleep(TICK_S)
        self.told.add("lost at the end", self._on_its_way())
        self._ends = True
        for line in self._lines:
            if line.transport is not None:
                line.transport.close()
        for task in keeping:
            task.cancel()
        self.told.write()

    def _on_its_way(self) -> int:
        return len(self._again) + sum(len(line.waiting) for line in self._lines)

    def _send(self, due: int) -> int:
        """Send what is due, and what is to be asked again first; how many new ones were sent."""
        new = 0
        for line in self._lines:
            if not (self._again and now() >= self._busy_until_s) and new >= due:
                break
            asked = []
            for _ in range(max(0, line.room)):
                if self._again and now() >= self._busy_until_s:
                    asked.append(self._again.popleft())
                elif new < due:
                    asked.append(self._questions[self._next % len(self._questions)])
                    self._next += 1
                    new += 1
            if asked:
                line.ask(asked)
        # Who asked first is asked last the next time.
        self._lines = self._lines[1:] + self._lines[:1]
        self.told.add("asked", new)
        return new

    async def _keep(self) -> None:
        """Keep a connection to the server that the address names."""
        loop = asyncio.get_running_loop()
        while not self._ends:
            try:
                port = json.loads(self._place.address.read_text())["http"]
                _, line = await loop.create_connection(lambda: Line(self), "127.0.0.1", port)
            except OSError:
                self.told.fault("unexplained: no connection", "refused")
                await asyncio.sleep(AGAIN_S)
                continue
            self._lines.append(line)
            self.told.add("connections")
            while line.transport is not None:
                await asyncio.sleep(TICK_S)

    def answered(self, question: Question, status: int, head: bytes, body: bytes, begun_s: float) -> None:
        """An answer is there."""
        self.told.add(f"{question.kind}: {status}")
        if status in BUSY and question.may_be(200):
            if b"retry-after" not in head.lower():
                self.told.fault("unexplained: busy without a time", body)
            self._busy_until_s = now() + AGAIN_S
            self._again.append(question)
            return
        self.told.add("answered")
        if not question.may_be(status):
            self.told.fault(f"unexplained: {question.kind} {status}", body)
        elif status == 200:
            self._checker.check(question.texts, question.customers, question.read(head, body), begun_s)

    def ended(self, line: Line, unanswered: list[Question], was_told: bool, error: Exception | None) -> None:
        """A connection has ended."""
        self._lines.remove(line)
        if self._ends:
            return
        self._again += unanswered
        if was_told:
            self.told.add("asked again after the server closed", len(unanswered))
        elif unanswered:
            self.told.fault("lost: the connection ended without a word", f"{len(unanswered)} requests, {error}")
        else:
            self.told.add("idle connections that ended")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--connections", type=int, default=24)
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    client = Client(Place(options.place), options.seed, options.connections, options.rate)
    uvloop.run(client.run(options.seconds))


if __name__ == "__main__":
    main()
