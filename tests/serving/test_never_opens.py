"""`qrlora-deploy serve`: what never opens, or dies while it opens, ends the server in one line within a bound."""

import os
import re
from pathlib import Path

import pytest

from tests.cli.running import run
from tests.serving.process import Served
from tests.serving.test_processes import children, is_ready, place, serve, until

__all__ = ["place"]

SLOW = """
import os, pathlib, signal, sys, time
from qrlora_deploy.serving import opening
from qrlora_deploy.serving.engine import sources

open_session = opening._open_session

def slow(bundle, options):
    {what}
    return open_session(bundle, options)

if not {number!r} or any('"role":"engine","number":{number}' in word for word in sys.orig_argv):
    opening._open_session = slow
"""
WAITS = "time.sleep(1000) if pathlib.Path({path!r}).exists() else None"


def opens_so(place: Path, monkeypatch: pytest.MonkeyPatch, what: str, number: str = "") -> None:
    """Have each process, or the engine of a number, do something where it opens its model."""
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(SLOW.format(what=what, number=number))
    monkeypatch.setenv("PYTHONPATH", f"{place / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


ONE = ("serve", "bundle", "--customers", "customers", "--port", "0", "--open-seconds", "3")
TWO = ("--processes", "1", "--device", "cpu", "--device", "cpu")
NEVER = "was not open after 3 s; look whether its disk, store or device answers, or give --open-seconds 6"


@pytest.mark.parametrize("more", [(), ("--check",), ("--check", *TWO)], ids=["serve", "check", "check of two"])
def test_a_process_that_waits_for_a_model_ends(
    place: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    opens_so(place, monkeypatch, "time.sleep(1000)")
    ran = run(*ONE, *more, cwd=place)
    assert ran.code == 1 and ran.err.splitlines() == [f"Error: bundle, the bundle of bundle, on cpu {NEVER}"]


def test_the_second_engine_that_waits_is_named_and_all_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens_so(place, monkeypatch, "time.sleep(1000)", "1")
    ran = run(*ONE, *TWO, cwd=place)
    assert ran.code == 1 and re.fullmatch(
        rf"Error: engine 1 \(process \d+\): bundle, the bundle of bundle, on cpu {re.escape(NEVER)}", ran.err.strip()
    )


def test_the_second_engine_that_dies_is_named_and_all_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens_so(place, monkeypatch, "os.kill(os.getpid(), signal.SIGKILL)", "1")
    ran = run(*ONE, *TWO, cwd=place)
    died = r"Error: engine 1 \(process \d+\) was ended by SIGKILL while it opened bundle, the bundle of bundle, on cpu"
    assert ran.code == 1 and re.fullmatch(f"{died}; the server ends", ran.err.strip())


def test_customers_that_wait_are_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens_so(place, monkeypatch, "sources.FolderSource.open = lambda *all: time.sleep(1000)")
    ran = run(*ONE, cwd=place)
    assert ran.code == 1 and ran.err.splitlines() == [f"Error: customers, with the customers of bundle, {NEVER}"]


def test_an_engine_that_waits_when_it_is_started_again_is_tried_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens_so(place, monkeypatch, WAITS.format(path=str(place / "waits")), "0")
    with serve(place, "--open-seconds", 3, fronts=1) as server:
        (place / "waits").touch()
        os.kill(children(server, "engine")[0], 9)
        until(lambda: sum("was not open after 3 s" in line for line in server.errors) > 0)
        assert not is_ready(server.url)
        (place / "waits").unlink()
        until(lambda: is_ready(server.url))
    assert server.end() == 0


def test_a_server_that_opens_in_time_is_not_ended_later(place: Path) -> None:
    with Served("bundle", "--threads", 1, "--open-seconds", 20, cwd=place) as server:
        assert is_ready(server.url)
    assert server.end() == 0 and server.errors == []
