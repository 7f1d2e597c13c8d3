"""Requests to a server, from a process of their own: by a Poisson clock, or each as soon as the last one is answered.

It speaks HTTP by hand: a client library would take more of the cores than the server that is measured.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qrlora_deploy.data.sample import sample_texts

ZIPF = 1.2
"""Customers are drawn by rank to this power: few have most of the traffic."""

MLSERVER_MODEL = "peer"


@dataclass
class Told:
    """What came back.

    Attributes:
        seconds: from the scheduled start of each request, by status.
        sent_s: from when it was sent: without what its client was late.
        late_s: from the schedule to when the client came to it, of all requests.
        wall_s: of all.
    """

    seconds: dict[int, list[float]] = field(default_factory=dict)
    sent_s: dict[int, list[float]] = field(default_factory=dict)
    late_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0

    def add(self, status: int, seconds: float, sent_s: float) -> None:
        """A request was answered."""
        self.seconds.setdefault(status, []).append(seconds)
        self.sent_s.setdefault(status, []).append(sent_s)

    def __add__(self, other: "Told") -> "Told":
        """Of two clients that asked at the same time."""
        seconds, sent_s = _joined(self.seconds, other.seconds), _joined(self.sent_s, other.sent_s)
        return Told(seconds, sent_s, self.late_s + other.late_s, max(self.wall_s, other.wall_s))

    def record(self, rows: int) -> dict[str, Any]:
        """Counts, rates and percentiles in ms by status."""
        late = {"client_late": percentiles_ms(self.late_s)} if self.late_s else {}
        return {
            "wall_s": self.wall_s,
            "rows_per_s": rows * len(self.seconds.get(200, [])) / self.wall_s,
            "by_status": {str(status): percentiles_ms(found) for status, found in sorted(self.seconds.items())},
            "from_sent": {str(status): percentiles_ms(found) for status, found in sorted(self.sent_s.items())},
            **late,
        }


def _joined(one: dict[int, list[float]], other: dict[int, list[float]]) -> dict[int, list[float]]:
    return {status: one.get(status, []) + other.get(status, []) for status in one.keys() | other.keys()}


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """How many there are, and their percentiles in ms."""
    return {"requests": len(seconds)} | {
        f"p{share}": float(np.percentile(seconds, share) * 1e3) for share in (50, 90, 99)
    }


def drawn(count: int, rows: int, customers: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """The texts and the customers of `count` requests of `rows` rows each; customers by Zipf."""
    random = np.random.default_rng(seed)
    texts = sample_texts()
    weights = 1 / np.arange(1, customers + 1) ** ZIPF
    owners = random.choice(customers, size=(count, rows), p=weights / weights.sum())
    chosen = random.integers(len(texts), size=(count, rows))
    return [
        ([texts[index] for index in indices], [name_of(owner) for owner in names])
        for indices, names in zip(chosen, owners, strict=True)
    ]


def classify(texts: Sequence[str], customers: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The path and body of a request in plain JSON."""
    return "/v1/classify", {"texts": list(texts), "customers": list(customers)}


def infer(texts: Sequence[str], customers: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The path and body of a request to MLServer by the Open Inference Protocol."""
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [len(values), 1], "data": list(values)}
        for name, values in (("text", texts), ("customer", customers))
    ]
    return f"/v2/models/{MLSERVER_MODEL}/infer", {"inputs": inputs}


FORMS = {"classify": classify, "infer": infer}


def bodies(count: int, rows: int, customers: int, seed: int, form: str = "classify") -> list[bytes]:
    """`count` requests as `drawn` gives them, in a form of `FORMS`."""
    return [request(*FORMS[form](texts, owners)) for texts, owners in drawn(count, rows, customers, seed)]


def request(path: str, record: dict[str, Any]) -> bytes:
    """A request's bytes."""
    body = json.dumps(record).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: s\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def binary_bodies(count: int, rows: int, length: int, customers: int, seed: int) -> list[bytes]:
    """`count` requests by the protocol's binary extension: token ids `[rows, length]`, a customer in each row."""
    random = np.random.default_rng(seed)
    mask = np.ones((rows, length), np.int64).tobytes()
    made = []
    for _ in range(count):
        ids = random.integers(5, 200, (rows, length)).tobytes()
        names = [name_of(owner).encode() for owner in random.integers(customers, size=rows)]
        owners = b"".join(len(name).to_bytes(4, "little") + name for name in names)
        tensors = {"input_ids": ids, "attention_mask": mask, "customer": owners}
        inputs = [
            {
                "name": name,
                "datatype": "BYTES" if name == "customer" else "INT64",
                "shape": [rows] if name == "customer" else [rows, length],
                "parameters": {"binary_data_size": len(data)},
            }
            for name, data in tensors.items()
        ]
        asked = {"inputs": inputs, "outputs": [{"name": "logits"}], "parameters": {"binary_data_output": True}}
        head = json.dumps(asked).encode()
        size = len(head) + sum(map(len, tensors.values()))
        lines = f"POST /v2/models/bundle/infer HTTP/1.1\r\nHost: s\r\nInference-Header-Content-Length: {len(head)}\r\n"
        made.append(f"{lines}Content-Length: {size}\r\n\r\n".encode() + head + b"".join(tensors.values()))
    return made


def name_of(number: int) -> str:
    """A customer's id."""
    return f"c{number:06}"


class Connection:
    """One connection that is kept, with one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> int:
        """The status of the answer, whose body has been read."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
        await reader.readexactly(length)
        if b"connection: close" in lines:
            writer.close()
            self._streams = None
        return int(head.split(b" ", 2)[1])


async def closed(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Told:
    """Each connection asks again as soon as it is answered."""
    told, start, turns = Told(), time.perf_counter(), iter(range(10**9))

    async def work() -> None:
        connection = Connection(port)
        while time.perf_counter() - start < seconds:
            begin = time.perf_counter()
            status = await connection.ask(requests[next(turns) % len(requests)])
            taken = time.perf_counter() - begin
            told.add(status, taken, taken)

    await asyncio.gather(*(work() for _ in range(connections)))
    told.wall_s = time.perf_counter() - start
    return told


async def opened(
    port: int, requests: Sequence[bytes], connections: int, seconds: float, rate: float, seed: int
) -> Told:
    """Requests begin by a Poisson clock whatever is answered; times count from when they should have begun."""
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds)))
    told, start = Told(), time.perf_counter()
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(Connection(port))

    async def one(number: int, due: float) -> None:
        told.late_s.append(time.perf_counter() - due)
        connection = await free.get()
        sent = time.perf_counter()
        status = await connection.ask(requests[number % len(requests)])
        end = time.perf_counter()
        told.add(status, end - due, end - sent)
        free.put_nowait(connection)

    tasks = []
    for number, arrival in enumerate(arrivals):
        due = start + arrival
        early = due - time.perf_counter()
        if early > 0:
            await asyncio.sleep(early)
        tasks.append(asyncio.create_task(one(number, due)))
    await asyncio.gather(*tasks)
    told.wall_s = time.perf_counter() - start
    return told


def main() -> None:
    """Print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rows", type=int, default=1, help="of a request")
    parser.add_argument("--length", type=int, help="token ids of a row, in binary; without it texts")
    parser.add_argument("--form", choices=list(FORMS), default="classify", help="of requests of texts")
    parser.add_argument("--customers", type=int, default=1)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, help="requests a second, open loop; without it closed loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true", help="print every time")
    options = parser.parse_args()
    if options.length:
        requests = binary_bodies(64, options.rows, options.length, options.customers, options.seed)
    else:
        requests = bodies(2048, options.rows, options.customers, options.seed, options.form)
    common = (options.port, requests, options.connections, options.seconds)
    run = opened(*common, options.rate, options.seed) if options.rate else closed(*common)
    told = asyncio.run(run)
    json.dump(asdict(told) if options.raw else told.record(options.rows), sys.stdout)


if __name__ == "__main__":
    main()
