"""The servers that are compared: how each is started, and whether it is there."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from benchmarks.export_speed import ROOT, variables_of
from benchmarks.server.load import FORMS, name_of
from benchmarks.server.peers.answering import Answers, Behind

READY_S = 240.0


@dataclass(frozen=True)
class Contestant:
    """A server.

    Attributes:
        name: in the record.
        module: of `benchmarks.server.peers`; None: the product's own server.
        behind: what it answers by.
        processes: that it may have, in its own sense.
        engines: of the product's server with processes, all on one device.
        form: of requests, of `FORMS`.
        packages: a folder whose packages come before the others.
    """

    name: str
    module: str | None
    behind: Behind
    processes: int
    form: str = "classify"
    engines: int = 1
    packages: Path | None = None

    def command(self, port: int) -> list[str]:
        """What starts it."""
        if self.module is not None:
            return [sys.executable, "-m", f"benchmarks.server.peers.{self.module}", str(port), str(self.processes)]
        packed = str(Path(self.behind.folder, f"{self.behind.customers}.packed"))
        words = ("--packed", packed, "--port", str(port), *("--device", self.behind.device) * self.engines)
        options = ("--processes", str(self.processes)) if self.processes else ()
        bundle = str(Path(self.behind.folder, "bundle"))
        return [sys.executable, "-m", "qrlora_deploy.cli", "serve", bundle, *words, *options]

    def variables(self) -> Mapping[str, str]:
        """Its environment."""
        variables = variables_of(ROOT) | self.behind.variables()
        if self.packages is not None:
            variables["PYTHONPATH"] = f"{self.packages}{os.pathsep}{variables['PYTHONPATH']}"
        return variables


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    contestant: Contestant
    port: int

    def ask(self, texts: Sequence[str], customers: Sequence[str]) -> Answers:
        """One request; labels and scores."""
        path, record = FORMS[self.contestant.form](texts, customers)
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", orjson.dumps(record), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            body = orjson.loads(response.read())
        if self.contestant.form == "infer":
            outputs = {output["name"]: output["data"] for output in body["outputs"]}
            return outputs["label"], outputs["score"]
        return [one["label"] for one in body["answers"]], [one["score"] for one in body["answers"]]


def free_ports() -> Iterator[int]:
    """Ports with two free ones after each, as MLServer wants."""
    for port in range(20000 + os.getpid() % 5000 * 4, 60000, 4):
        sockets = [socket.socket() for _ in range(3)]
        try:
            for number, one in enumerate(sockets):
                one.bind(("127.0.0.1", port + number))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
        yield port


@contextmanager
def started(contestants: Sequence[Contestant], folder: Path) -> Iterator[list[Running]]:
    """Servers, started side by side, once they have answered; ended at the end. Their outputs are in the folder."""
    servers: list[tuple[Running, subprocess.Popen[bytes]]] = []
    try:
        for port, contestant in zip(free_ports(), contestants, strict=False):
            with (folder / f"{contestant.name}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.server.peers.guarded", *contestant.command(port)],
                    cwd=folder,
                    env=dict(contestant.variables()),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            servers.append((Running(contestant, port), process))
        for running, process in servers:
            _wait(running, process, folder)
        yield [running for running, _ in servers]
    finally:
        for _, process in servers:
            # What guards it ends it then, and all that it started.
            assert process.stdin is not None
            process.stdin.close()
        for _, process in servers:
            process.wait()


def _wait(running: Running, process: subprocess.Popen[bytes], folder: Path) -> None:
    end = time.monotonic() + READY_S
    while True:
        try:
            running.ask(["is anybody there"], [name_of(0)])
            return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > end:
                log = (folder / f"{running.contestant.name}.log").read_text(errors="replace")
                raise SystemExit(f"{running.contestant.name} does not answer:\n{log[-3000:]}") from None
            time.sleep(0.2)
