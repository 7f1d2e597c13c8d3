"""`qrlora-deploy serve --processes`: the same answers from several processes, and what happens when one dies."""

import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from tests.cli.running import run, run_here
from tests.serving.process import Served
from tests.tiny import SENTENCES

httpx = pytest.importorskip("httpx", reason="needs the extra client")

TEXTS = list(SENTENCES)
DEADLINE_S = 40.0


@pytest.fixture
def place(tmp_path: Path, switchable: Path, customers: dict[str, Coefficients]) -> Path:
    """A folder with a bundle and customers."""
    shutil.copytree(switchable, tmp_path / "bundle")
    (tmp_path / "customers").mkdir()
    for name, customer in customers.items():
        write_coefficients(customer, tmp_path / "customers" / f"{name}.safetensors")
    return tmp_path


def serve(place: Path, *more: object, fronts: int = 2) -> Served:
    return Served("bundle", "--customers", "customers", "--threads", 1, "--processes", fronts, *more, cwd=place)


def children(server: Served, role: str) -> list[int]:
    """Processes of the server that are "front" or "engine"."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except (OSError, IndexError, UnicodeDecodeError):
            continue
        if parent == str(server.process.pid) and f'"role":"{role}"' in " ".join(words):
            found.append(int(entry.name))
    return found


def raw_logits(client: Any, customer: str | None) -> bytes:
    """Bytes of the answers, as the binary extension gives them."""
    record = {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        "parameters": {"customer": customer or ""},
    }
    reply = client.post("/v2/models/bundle/infer", json=record)
    assert reply.status_code == 200, reply.text
    return bytes(reply.content[int(reply.headers["inference-header-content-length"]) :])


def until(what: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_ready(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/v2/health/ready").status_code == 200)
    except httpx.TransportError:
        return False


def metric(url: str, name: str) -> float:
    """A metric without labels but `model`."""
    text = httpx.get(f"{url}/metrics").text
    return float(re.search(rf'^{name}(?:{{model="bundle"}})? (\S+)$', text, re.MULTILINE)[1])  # type: ignore[index]


class Load:
    """Clients that ask again and again, each on connections of its own."""

    def __init__(self, url: str, count: int = 4) -> None:
        self.url, self.codes, self.failures, self.wrong = url, [], [], []  # type: ignore[var-annotated]
        self.retry = set()  # type: ignore[var-annotated]
        self.ends, self.not_ready = threading.Event(), threading.Event()
        with httpx.Client(base_url=url, timeout=30) as client:
            self.expected = {name: raw_logits(client, name) for name in ("acme", "beta")}
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def _ask(self, number: int) -> None:
        name = ("acme", "beta")[number % 2]
        while not self.ends.is_set():
            try:
                with httpx.Client(base_url=self.url, timeout=30) as client:
                    while not self.ends.is_set():
                        self._ask_once(client, name)
            except httpx.HTTPError as error:
                self.failures.append(error)
                time.sleep(0.02)

    def _ask_once(self, client: Any, name: str) -> None:
        record = {
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
            "parameters": {"customer": name},
        }
        reply = client.post("/v2/models/bundle/infer", json=record)
        self.codes.append(reply.status_code)
        if reply.status_code == 200:
            logits = reply.content[int(reply.headers["inference-header-content-length"]) :]
            # Rows of others may be in the batch: of fp32 the last bits may differ.
            if not np.allclose(np.frombuffer(logits, "<f4"), np.frombuffer(self.expected[name], "<f4"), atol=1e-4):
                self.wrong.append(name)
        else:
            self.retry.add(reply.headers.get("retry-after"))
        if client.get("/v2/health/ready").status_code != 200:
            self.not_ready.set()

    def stop(self) -> None:
        self.ends.set()
        for thread in self.threads:
            thread.join(60)


def test_the_same_bits_as_in_one_process(place: Path) -> None:
    names = (None, "acme", "beta", "gamma", "delta")
    with (
        Served("bundle", "--customers", "customers", "--threads", 1, cwd=place) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        expected = {name: raw_logits(client, name) for name in names}
    with serve(place) as server:
        assert len(children(server, "front")) == 2 and len(children(server, "engine")) == 1
        for _ in range(4):
            with httpx.Client(base_url=server.url, timeout=30) as client:
                assert {name: raw_logits(client, name) for name in names} == expected
                reply = client.post("/v1/classify", json={"texts": TEXTS, "customer": "nobody"})
                assert reply.status_code == 404 and "no customer of that name" in reply.json()["error"]
        assert metric(server.url, "qrlora_rows_total") == 4 * len(names) * len(TEXTS)
        assert 'qrlora_requests_total{code="404",route="/v1/classify"} 4.0' in httpx.get(f"{server.url}/metrics").text
    assert server.end() == 0 and server.errors == []


def test_a_front_that_is_killed_costs_its_own_requests_alone(place: Path) -> None:
    with serve(place) as server:
        load = Load(server.url)
        until(lambda: len(load.codes) > 40)
        before = children(server, "front")
        os.kill(before[0], signal.SIGKILL)
        until(lambda: len(set(children(server, "front")) - set(before)) == 1)
        answered = len(load.codes)
        until(lambda: len(load.codes) > answered + 40)
        load.stop()
        # Those who were connected to it lost their connection; nobody else noticed.
        assert set(load.codes) == {200} and not load.wrong
        assert all(isinstance(failure, httpx.TransportError) for failure in load.failures)
        until(lambda: metric(server.url, "qrlora_queue_rows") == 0)
    assert server.end() == 0
    assert any(re.search(r"front \d \(process \d+\) was ended by SIGKILL", line) for line in server.errors)


def test_an_engine_that_is_killed_is_started_once_again(place: Path) -> None:
    with serve(place) as server:
        load = Load(server.url)
        until(lambda: len(load.codes) > 20)
        counted = metric(server.url, "qrlora_rows_total")
        os.kill(children(server, "engine")[0], signal.SIGKILL)
        until(lambda: 503 in load.codes and load.not_ready.is_set())
        until(lambda: is_ready(server.url))
        # What the first one counted stays counted.
        assert metric(server.url, "qrlora_rows_total") >= counted > 0
        answered = load.codes.count(200)
        until(lambda: load.codes.count(200) > answered + 20)
        load.stop()
        assert set(load.codes) == {200, 503} and not load.wrong and not load.failures and load.retry == {"1"}
        assert any("engine 0" in line and "SIGKILL" in line for line in server.errors)
        os.kill(children(server, "engine")[0], signal.SIGKILL)
        assert server.wait() == 1
    assert "was ended by SIGKILL for the second time within 600 s" in server.errors[-1]
    assert not any("Traceback" in line for line in server.errors)


def test_sigterm_under_load_loses_no_request(place: Path) -> None:
    with serve(place, "--drain-delay", 2) as server:
        load = Load(server.url)
        until(lambda: len(load.codes) > 40)
        # The whole group is told, as by systemd or a terminal; the supervisor alone acts on it.
        for pid in (*children(server, "front"), *children(server, "engine"), server.process.pid):
            os.kill(pid, signal.SIGTERM)
        until(load.not_ready.is_set)
        load.stop()
        assert set(load.codes) == {200} and not load.failures and not load.wrong
        assert server.wait() == 0
    assert server.errors == []


def test_sighup_reads_keys_again_in_every_process(place: Path) -> None:
    first = run_here("keys", "add", "keys.json", "--customer", "*", "--json", cwd=place).json["key"]
    with serve(place, "--keys", "keys.json") as server:

        def codes(key: str) -> set[int]:
            headers = {"authorization": f"Bearer {key}"}
            record = {"texts": TEXTS[:1], "customer": "beta"}
            # Each on a connection of its own: they meet both fronts.
            return {
                httpx.post(f"{server.url}/v1/classify", json=record, headers=headers).status_code for _ in range(12)
            }

        assert codes(first) == {200} and codes("other") == {401}
        second = run_here("keys", "add", "keys.json", "--customer", "acme", "--json", cwd=place).json["key"]
        server.send(signal.SIGHUP)
        until(lambda: codes(second) == {404})
    assert server.end() == 0 and server.errors == []


def test_nothing_stays_where_the_supervisor_is_killed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Pytest's own folders have paths that are too long for sockets.
        monkeypatch.setenv("TMPDIR", folder)
        _kill_a_supervisor(place, lambda: set(Path(folder).rglob("*.sock")))


def _kill_a_supervisor(place: Path, sockets: Callable[[], set[Path]]) -> None:
    with serve(place) as server:
        pids = children(server, "front") + children(server, "engine")
        server.send(signal.SIGKILL)
        server.process.wait(DEADLINE_S)
        until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids))
    left = sockets()
    with serve(place):
        # The next one removes what could not be removed by the first.
        assert len(sockets()) == 1 and not sockets() & left
    assert not sockets()


def test_a_long_tmpdir_is_refused_in_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = place / ("long" * 25)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    ran = run("serve", "bundle", "--customers", "customers", "--port", "0", "--processes", "1", cwd=place)
    assert ran.code == 2 and "bytes too long for sockets; set TMPDIR to a shorter one" in ran.err
    assert "Traceback" not in ran.err and not list(long.rglob("*.sock"))


REFUSED = {
    "no such device": ("--processes 1 --device tpu", "tpu"),
    "devices of one process": ("--device cpu --device cpu", "--processes"),
    "an option that is none": ("--provider-option arena", "must be KEY=VALUE"),
    "an option twice": ("--provider-option a=1 --provider-option a=2", "given twice"),
    "a short patience": ("--processes 1 --hang-seconds 0.2", "--hang-seconds 0.2 is too short"),
    "a bound for replicas": ("--ray --hang-seconds 9", "--hang-seconds does nothing unless"),
    "a short time to open": ("--open-seconds 0.2", "--open-seconds 0.2 is too short"),
    "a time to open for replicas": ("--ray --open-seconds 9", "--open-seconds does nothing unless"),
    "keys that are none": ("--processes 1 --keys bundle/manifest.json", "manifest.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_one_line(place: Path, name: str) -> None:
    line, words = REFUSED[name]
    ran = run("serve", "bundle", "--port", "0", *line.split(), cwd=place)
    assert ran.code == 2 and words in ran.err.splitlines()[-1], ran.err
    assert "Traceback" not in ran.err


def test_check_opens_the_model_on_each_device(place: Path) -> None:
    line = "serve bundle --customers customers --check --port 0 --processes 2 --device cpu --device cpu --json"
    ran = run_here(*line.split(), cwd=place)
    assert ran.code == 0 and ran.json["models"] == [{"model": "bundle", "customers": 4, "problems": []}]


def test_an_engine_for_each_device_and_what_is_erased_is_gone_from_all(
    place: Path, customers: dict[str, Coefficients]
) -> None:
    # Of the first two each device has one.
    names = ("acme", "beta", "other")
    for file in (place / "customers").iterdir():
        file.unlink()
    (place / "only").mkdir()
    for name in names:
        write_coefficients(customers["acme"], place / "only" / f"{name}.safetensors")
    assert run_here("pack", "only", "--bundle", "bundle", "-o", "packed.safetensors", cwd=place).code == 0
    key = run_here("keys", "add", "keys.json", "--customer", "*", "--admin", "--json", cwd=place).json["key"]
    guarded = ("--keys", "keys.json", "--admin-port", 0, "--audit-log", "audit.jsonl")
    headers = {"authorization": f"Bearer {key}"}
    with serve(place, "--packed", "packed.safetensors", "--device", "cpu", "--device", "cpu", *guarded) as server:
        assert len(children(server, "engine")) == 2

        def code(name: str) -> int:
            record = {"texts": TEXTS, "customer": name}
            return int(httpx.post(f"{server.url}/v1/classify", json=record, headers=headers).status_code)

        assert {name: code(name) for name in names} == dict.fromkeys(names, 200)
        scraped = httpx.get(f"{server.url}/metrics", headers=headers).text
        # Both engines together.
        assert f'qrlora_rows_total{{model="bundle"}} {len(TEXTS) * len(names)}.0' in scraped
        assert f'qrlora_table_resident{{model="bundle"}} {2 * len(names)}.0' in scraped
        admin = f"http://127.0.0.1:{server.ports['--admin-port']}/v1/models/bundle/customers"
        for name in names[:2]:
            assert httpx.delete(f"{admin}/{name}?erase=true", headers=headers).status_code == 200
        until(lambda: [code(name) for name in names] == [404, 404, 200])
        assert httpx.post(f"{admin.rpartition('/v1')[0]}/v1/reload", headers=headers).status_code == 200
        assert code("other") == 200
    assert server.end() == 0 and server.errors == []
