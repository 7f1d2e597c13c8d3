"""Replicas by Ray Serve on this machine: nothing is lost or wrong while they are killed, replaced, and scaled.

Slow: Ray takes some seconds to start. `.ci/ray_only` runs these tests where Ray is installed.
"""

import http.client
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="needs the extra ray; .ci/ray_only runs it")

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.prediction.predictor import Predictor
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.serving.process import Served
from tests.tiny import SENTENCES
from tests.tolerances import FP32_ONNX

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

REPLICAS, CLIENTS = 3, 6
LOST = 'qrlora_asked_again_total{reason="lost"}'
"""The front's count of requests whose replica ended."""

TEXTS = SENTENCES * 30
"""Enough for most of a request's time to be a replica's, which then has some when it is killed."""

NAMES = [f"customer-{number}" for number in range(12)]


@pytest.fixture(scope="module")
def many(tiny_customer: Coefficients) -> dict[str, Coefficients]:
    """Customers whose answers differ by far more than a tolerance."""
    factors = np.linspace(-1.5, 1.5, len(NAMES), dtype=np.float32)
    return {
        name: replace(tiny_customer, values=tiny_customer.values * factor)
        for name, factor in zip(NAMES, factors, strict=True)
    }


@pytest.fixture(scope="module")
def place(switchable: Path, many: dict[str, Coefficients], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundle`, a link to `v1`, copies of that with other manifests, and `customers`."""
    folder = tmp_path_factory.mktemp("place")
    for indent, version in enumerate(("v1", "v2", "broken")):
        shutil.copytree(switchable, folder / version)
        manifest = folder / version / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=indent))
    (folder / "broken" / "tokenizer.json").write_text("{}")
    (folder / "bundle").symlink_to("v1")
    (folder / "customers").mkdir()
    for name, customer in many.items():
        write_coefficients(customer, folder / "customers" / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def scores(switchable: Path, many: dict[str, Coefficients]) -> dict[str, list[float]]:
    """What one session says of each customer and sentence."""
    session = SwitchableSession(open_bundle(switchable), threads=1)
    for name, customer in many.items():
        session.load(name, customer)
    predictor = Predictor(session)
    found = {
        name: [one.score for one in predictor.predict(list(SENTENCES), customers=[name] * len(SENTENCES))]
        for name in NAMES
    }
    each = np.array(list(found.values()))
    # No customer could be taken for another one.
    gaps = [np.abs(one - other).max() for one, other in itertools.combinations(each, 2)]
    assert min(gaps) > 10 * FP32_ONNX["atol"]
    return found


@contextmanager
def served(place: Path, *options: object) -> Iterator[Served]:
    with Served(
        "bundle", "--customers", "customers", "--threads", 1, "--ray", "--replicas", REPLICAS, *options, cwd=place
    ) as server:
        yield server


def replicas(server: Served) -> set[int]:
    """Processes of replicas that the server has."""
    return processes(server, lambda command: command.startswith(b"ray::ServeReplica"))


def processes(server: Served, is_one: Callable[[bytes], bool]) -> set[int]:
    """Processes that the server has, by their command lines."""
    parents: dict[int, int] = {}
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if is_one(command):
            found.add(int(folder.name))

    def is_ours(process: int) -> bool:
        while process in parents and process != server.process.pid:
            process = parents[process]
        return process == server.process.pid

    return {process for process in found if is_ours(process)}


@dataclass
class Load:
    """Clients that ask without a pause, and hold every answer against what it must be.

    Attributes:
        answered: requests.
        wrong: replies that are not what they must be.
    """

    port: int
    scores: dict[str, list[float]]
    digests: dict[str, str]
    answered: int = 0
    wrong: list[Any] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._done, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _ask(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        for name in itertools.islice(itertools.cycle(NAMES), number, None):
            if self._done.is_set():
                return
            try:
                connection.request("POST", "/v1/classify", json.dumps({"texts": TEXTS, "customer": name}))
                reply = connection.getresponse()
                code, record = reply.status, json.loads(reply.read())
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                code, record = 0, repr(error)
            right = code == 200 and self._is_right(name, record["answers"])
            with self._lock:
                self.answered += 1
                if not right:
                    self.wrong.append((name, code, record))

    def _is_right(self, name: str, answers: list[dict[str, Any]]) -> bool:
        of = {(answer["customer"], answer["customer_digest"]) for answer in answers}
        found = [answer["score"] for answer in answers]
        return of == {(name, self.digests[name])} and np.allclose(found, self.scores[name] * 30, **FP32_ONNX)

    def until(self, condition: Callable[[], bool], seconds: float = 90.0) -> None:
        """Go on until something is so."""
        last = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < last
            time.sleep(0.2)

    def go_on(self, requests: int = 100) -> None:
        """Until so many more are answered."""
        enough = self.answered + requests
        self.until(lambda: self.answered >= enough)


def metric(server: Served, name: str) -> float:
    """A number of the front's metrics; 0 where there is none yet."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def load_on(server: Served, scores: dict[str, list[float]], many: dict[str, Coefficients]) -> Load:
    return Load(server.port, scores, {name: customer.digest for name, customer in many.items()})


def kill(process: int, server: Served, load: Load) -> None:
    """End a replica at once, and wait for the one that Ray starts in its place to answer."""
    before = replicas(server)
    os.kill(process, signal.SIGKILL)
    load.until(lambda: bool(replicas(server) - before) and len(replicas(server)) == REPLICAS)
    load.go_on()


def change_bundle(version: str, place: Path, server: Served) -> None:
    (place / "next").symlink_to(version)
    (place / "next").replace(place / "bundle")
    server.send(signal.SIGHUP)


def test_nothing_is_lost_when_replicas_are_killed_or_replaced_and_when_all_end(
    place: Path, scores: dict[str, list[float]], many: dict[str, Coefficients]
) -> None:
    with served(place, "--drain-delay", 10) as server:
        with load_on(server, scores, many) as load:
            load.go_on()
            assert len(replicas(server)) == REPLICAS
            # Each in turn, so that every customer's is among them, and Ray has replaced it.
            for process in replicas(server):
                kill(process, server, load)
            # Until one had a request that it had begun.
            while metric(server, LOST) == 0:
                kill(replicas(server).pop(), server, load)
            assert load.wrong == []
            lost = metric(server, LOST)

            old = replicas(server)
            change_bundle("broken", place, server)
            load.until(lambda: any("not reloaded: " in line for line in server.errors))
            load.go_on()
            assert replicas(server) == old
            change_bundle("v2", place, server)
            load.until(lambda: not old & replicas(server) and len(replicas(server)) == REPLICAS)
            load.go_on()
            assert load.wrong == []
            # They were not killed with requests in them.
            assert metric(server, LOST) == lost
        answered = load.answered
        print(f"{answered} requests, {lost:g} asked again after kills")
        assert metric(server, 'qrlora_requests_total{code="200",route="/v1/classify"}') == answered
        last = replicas(server)
        with load_on(server, scores, many) as load:
            load.go_on(20)
            server.send(signal.SIGTERM)
            load.go_on(20)
        # The clients have stopped before --drain-delay was over.
        assert load.wrong == [] and server.wait() == 0
        load.until(lambda: not any(Path(f"/proc/{process}").exists() for process in last))
    assert not [line for line in server.errors if "Traceback" in line]


def test_without_the_head_answers_go_on_until_ray_gives_up_and_the_front_ends(
    place: Path, scores: dict[str, list[float]], many: dict[str, Coefficients], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray's own is 60 s.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
    with served(place, "--replicas", 2) as server:
        with load_on(server, scores, many) as load:
            load.go_on()
            (head,) = processes(server, lambda command: b"gcs_server" in command.split(b"\0")[0])
            os.kill(head, signal.SIGKILL)
            load.go_on(20)
        assert load.wrong == []
        # Whoever runs the front starts it again, and it finds the head or brings one.
        assert server.wait() == 1
    assert not replicas(server)
