"""`qrlora-deploy serve --processes`: a process that hangs is found, ended and started again, as one that crashes."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.life import Hanging, Life
from tests.serving.process import Served
from tests.serving.test_processes import Load, children, httpx, is_ready, metric, place, serve, until

__all__ = ["place"]

HANG = ("--hang-seconds", 8)

STUCK = """
import pathlib, time
from qrlora_deploy.serving.engine import running

run = running.BatchRunner._run

class Model:
    def __init__(self, model):
        self._model = model
    def __getattr__(self, name):
        return getattr(self._model, name)
    def answer(self, inputs, customers):
        while pathlib.Path({path!r}).exists():
            time.sleep(0.05)
        return self._model.answer(inputs, customers)

def stuck(self, rows):
    if not isinstance(self._model, Model):
        self._model = Model(self._model)
    return run(self, rows)

running.BatchRunner._run = stuck
"""


def test_an_engine_that_is_stopped_is_started_again(place: Path) -> None:
    with serve(place, *HANG) as server:
        load = Load(server.url)
        until(lambda: len(load.codes) > 20)
        before = children(server, "engine")
        os.kill(before[0], signal.SIGSTOP)
        # Readiness goes off before it is ended: others may take its requests.
        until(lambda: not is_ready(server.url))
        assert children(server, "engine") == before
        until(lambda: children(server, "engine") not in (before, []) and is_ready(server.url))
        answered = load.codes.count(200)
        until(lambda: load.codes.count(200) > answered + 20)
        load.stop()
        assert set(load.codes) == {200, 503} and not load.wrong and not load.failures and load.retry == {"1"}
    assert server.end() == 0
    assert any(re.search(r"engine 0 \(process \d+\) did not answer for 8 s and was killed", it) for it in server.errors)


def test_an_engine_that_goes_on_in_time_is_not_ended(place: Path) -> None:
    with serve(place, "--hang-seconds", 60) as server:
        before = children(server, "engine")
        os.kill(before[0], signal.SIGSTOP)
        # Both fronts have to know.
        until(lambda: {is_ready(server.url) for _ in range(8)} == {False})
        # Nobody waits for an engine that may never answer.
        reply = httpx.post(f"{server.url}/v1/classify", json={"texts": ["a"]}, timeout=20)
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1", reply.text
        assert "does not answer" in reply.text
        os.kill(before[0], signal.SIGCONT)
        until(lambda: is_ready(server.url))
        assert httpx.post(f"{server.url}/v1/classify", json={"texts": ["a"]}).status_code == 200
        assert children(server, "engine") == before
    assert server.end() == 0


def test_a_front_that_is_stopped_is_started_again(place: Path) -> None:
    with serve(place, "--hang-seconds", 3) as server:
        before = children(server, "front")
        os.kill(before[0], signal.SIGSTOP)
        until(lambda: len(set(children(server, "front")) - set(before)) == 1)
        assert before[1] in children(server, "front")
        until(lambda: {is_ready(server.url) for _ in range(8)} == {True})
    assert server.end() == 0
    assert any(re.search(r"front \d \(process \d+\) did not answer for 3 s and was killed", it) for it in server.errors)


def test_a_run_that_does_not_end_is_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(STUCK.format(path=str(place / "stuck")))
    monkeypatch.setenv("PYTHONPATH", f"{place / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with serve(place, "--hang-seconds", 4) as server:
        assert httpx.post(f"{server.url}/v1/classify", json={"texts": ["a"]}).status_code == 200
        (place / "stuck").touch()
        # It is answered once the engine has been ended.
        reply = httpx.post(f"{server.url}/v1/classify", json={"texts": ["a"]}, timeout=40)
        (place / "stuck").unlink()
        assert reply.status_code == 503 and "ended before the request was answered" in reply.text
        until(lambda: is_ready(server.url))
        assert httpx.post(f"{server.url}/v1/classify", json={"texts": ["a"]}).status_code == 200
        assert metric(server.url, "qrlora_rows_total") == 2
    assert server.end() == 0
    assert any("had a run of bundle that took more than 4 s and was killed" in line for line in server.errors)


def test_in_one_process_health_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(STUCK.format(path=str(place / "stuck")))
    monkeypatch.setenv("PYTHONPATH", f"{place / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (place / "stuck").touch()
    options = ("--customers", "customers", "--threads", 1, "--hang-seconds", 1)
    with Served("bundle", *options, cwd=place) as server, ThreadPoolExecutor() as pool:

        def live() -> dict[str, int]:
            return {name: httpx.get(f"{server.url}/v2/health/{name}").status_code for name in ("live", "ready")}

        assert live() == {"live": 200, "ready": 200}
        asked = pool.submit(httpx.post, f"{server.url}/v1/classify", json={"texts": ["a"]}, timeout=40)
        until(lambda: live() == {"live": 503, "ready": 503})
        (place / "stuck").unlink()
        assert asked.result().status_code == 200
        until(lambda: live() == {"live": 200, "ready": 200})
    assert server.end() == 0 and server.errors == []


def test_one_run_after_the_other_is_no_run_that_does_not_end() -> None:
    now, stats = [0.0], {"bert": EngineStats(running=1)}
    hanging = Hanging(lambda: stats, 10.0, lambda: now[0])
    for number in range(1, 50):
        stats["bert"] = EngineStats(running=number)
        now[0] += 9.0
        assert not hanging.found()
    now[0] += 9.0
    assert not hanging.found()
    now[0] += 1.0
    assert hanging.found() and Life(hanging.found).live is False and not Hanging(lambda: stats, 0.0).found()
    stats["bert"] = EngineStats(running=0)
    now[0] += 99.0
    assert not hanging.found()


def test_a_supervisor_that_is_stopped_keeps_no_request_waiting(place: Path) -> None:
    with serve(place) as server:
        server.send(signal.SIGSTOP)
        assert httpx.post(f"{server.url}/v1/classify", json={"texts": ["a"]}, timeout=20).status_code == 200
        reply = httpx.get(f"{server.url}/metrics", timeout=20)
        assert reply.status_code == 503 and "does not answer" in reply.text
        server.send(signal.SIGCONT)
        until(lambda: httpx.get(f"{server.url}/metrics").status_code == 200)
    assert server.end() == 0 and server.errors == []
