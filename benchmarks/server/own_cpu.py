"""A server's own CPU time of a request: without tokenising and without the run, its log off, its keys on.

    python -m benchmarks.server.own_cpu -o benchmarks/results/server_own_cpu.json
    python -m benchmarks.server.own_cpu --against CHECKOUT

Requests of one text come by HTTP (`/v1/classify` and the protocol) and by gRPC over several connections, each as soon
as the last one is answered. "empty" is what grpc's own server takes for nothing, beside ours. With another checkout of
the project, its server takes turns with this one's.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.common.measuring import environment
from benchmarks.export_speed import ROOT, checkouts_of, prepare, run_command, variables_of
from benchmarks.server.load import Connection
from qrlora_deploy.io.files import write_json

CONNECTIONS = (1, 16)
WARM_UP = 300
SERVER = Path(__file__).with_name("own_cpu_server.py")
TEXT = "please cancel the order that I made this morning"
AIMS_US = {"classify": 80, "infer": 80, "grpc": 250}
EMPTY = "empty"


class Own:
    """A server that works for nothing."""

    def __init__(self, checkout: Path, bundle: Path, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), str(bundle), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables_of(checkout),
        )
        port, self.key = self._line().split()
        self.port = int(port)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def end(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


@contextmanager
def own(checkout: Path, bundle: Path, kind: str) -> Iterator[Own]:
    """A server that is ended at the end."""
    server = Own(checkout, bundle, kind)
    try:
        yield server
    finally:
        server.end()


def http_request(path: str, record: dict[str, Any], key: str) -> bytes:
    """A request's bytes, with the headers that clients usually send."""
    body = json.dumps(record).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1:8080",
        "User-Agent: python-httpx/0.28.1",
        "Accept: */*",
        "Connection: keep-alive",
        "Content-Type: application/json",
        f"Authorization: Bearer {key}",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


CLASSIFY = {"texts": [TEXT], "customer": "acme"}
INFER = {
    "parameters": {"customer": "acme"},
    "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [TEXT]}],
    "outputs": [{"name": "label"}, {"name": "scores"}],
}
PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "classify": ("/v1/classify", CLASSIFY),
    "infer": ("/v2/models/bundle/infer", INFER),
}


async def ask_http(kind: str, server: Own, connections: int, requests: int) -> None:
    """So many requests over so many connections."""
    data = http_request(*PATHS[kind], server.key)

    async def work() -> None:
        connection = Connection(server.port)
        for _ in range(requests // connections):
            status = await connection.ask(data)
            if status != 200:
                raise SystemExit(f"the server answers by {status}")

    await asyncio.gather(*(work() for _ in range(connections)))


async def ask_grpc(kind: str, server: Own, connections: int, requests: int) -> None:
    """The same by gRPC, with so many calls at a time over one channel."""
    import grpc

    from qrlora_deploy.serving.grpc.schema import SERVICE, ModelInferRequest, ModelInferResponse

    request = ModelInferRequest(model_name="bundle")
    request.parameters["customer"].string_param = "acme"
    request.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(TEXT.encode())
    for name in ("label", "scores"):
        request.outputs.add(name=name)
    metadata = (("authorization", f"Bearer {server.key}"),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        infer = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )

        async def work() -> None:
            for _ in range(requests // connections):
                await infer(request, metadata=metadata, timeout=60)

        await asyncio.gather(*(work() for _ in range(connections)))


WAYS: dict[str, Callable[[str, Own, int, int], Coroutine[Any, Any, None]]] = {
    "classify": ask_http,
    "infer": ask_http,
    "grpc": ask_grpc,
}


def cpu_us(kind: str, server: Own, connections: int, requests: int) -> float:
    """CPU of a request, in microseconds."""
    before = server.cpu_s()
    run = uvloop.run if kind != "grpc" else asyncio.run
    run(WAYS[kind](kind, server, connections, requests))
    return 1e6 * (server.cpu_s() - before) / (requests // connections * connections)


def _in_turn(kind: str, servers: dict[str, Own], connections: int, rounds: int, requests: int) -> dict[str, Any]:
    samples: dict[str, list[float]] = {name: [] for name in servers}
    for server in servers.values():
        cpu_us(kind, server, connections, WARM_UP)
    for turn in range(rounds):
        for name in list(servers)[:: 1 if turn % 2 else -1]:
            samples[name].append(cpu_us(kind, servers[name], connections, requests))
    return {"us": {name: statistics.median(values) for name, values in samples.items()}, "samples": samples}


def measure(bundle: Path, checkouts: dict[str, Path], rounds: int, requests: int) -> dict[str, Any]:
    """Rounds in which every checkout has its turn, for each kind and number of connections."""
    found: dict[str, Any] = {}
    for kind in WAYS:
        with ExitStack() as stack:
            front = "grpc" if kind == "grpc" else "http"
            servers = {name: stack.enter_context(own(checkout, bundle, front)) for name, checkout in checkouts.items()}
            if kind == "grpc":
                servers[EMPTY] = stack.enter_context(own(ROOT, bundle, EMPTY))
            for connections in CONNECTIONS:
                of_kind = _in_turn(kind, servers, connections, rounds, requests)
                print(kind, connections, of_kind["us"], flush=True)
                found[f"{kind}, {connections} at a time"] = of_kind | {"aim_us": AIMS_US[kind]}
    return found


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout of the project")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=3000, help="of a round")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    checkouts = checkouts_of(options.against)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, "minilm", ROOT)
        run_command(ROOT, folder, "export", "base", "--basis", "basis.safetensors", "-o", "bundle")
        found = measure(folder / "bundle", checkouts, options.rounds, options.requests)
    record = {"rounds": options.rounds, "requests": options.requests, "cpu": found, "environment": environment("cpu")}
    if options.output is not None:
        write_json(options.output, record)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
