"""`qrlora-deploy serve --processes`: what is missing or damaged while a process is started again ends no server."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from qrlora_deploy.serving.access import Keys
from tests.cli.running import run_here
from tests.serving.process import Served
from tests.serving.test_processes import TEXTS, children, httpx, is_ready, metric, place, serve, until

__all__ = ["place"]


def new_key(place: Path, *customers: str) -> dict[str, str]:
    options = [word for name in customers for word in ("--customer", name)]
    key = run_here("keys", "add", "keys.json", *options, "--json", cwd=place).json["key"]
    return {"authorization": f"Bearer {key}"}


def kill_and_wait(server: Served, role: str) -> None:
    before = children(server, role)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(children(server, role)) == len(before) and not set(children(server, role)) & set(before))
    until(lambda: is_ready(server.url))


@pytest.mark.parametrize("broken", ["gone", "damaged"])
def test_processes_start_with_the_keys_that_were_read_last(place: Path, broken: str) -> None:
    first = new_key(place, "acme")
    with serve(place, "--keys", "keys.json") as server:

        def code(headers: dict[str, str]) -> int:
            # A front that is being started has no connection for anybody.
            try:
                record = {"texts": TEXTS[:1], "customer": "acme"}
                return int(httpx.post(f"{server.url}/v1/classify", json=record, headers=headers).status_code)
            except httpx.TransportError:
                return 0

        assert code(first) == 200
        second = new_key(place, "acme", "beta")
        until(lambda: code(second) == 200)
        good = (place / "keys.json").read_bytes()
        # The engines read it once a second.
        until(lambda: second_is_kept(server, good))
        if broken == "gone":
            (place / "keys.json").unlink()
        else:
            (place / "keys.json").write_text("{")
        for role in ("front", "engine"):
            kill_and_wait(server, role)
            # A front that has not found the new engine yet says so by 503; a lost key would be 401, for good.
            until(lambda: {code(headers) for headers in (first, second) for _ in range(6)} == {200})
            assert code({"authorization": "Bearer qd_000000000000_x"}) == 401
        (place / "keys.json").write_bytes(good)
        revoked = first["authorization"].split("_")[1]
        assert run_here("keys", "revoke", "keys.json", revoked, cwd=place).code == 0
        until(lambda: {code(first) for _ in range(8)} == {401})
        assert code(second) == 200
    assert server.end() == 0
    assert any("the keys that were read before go on" in line for line in server.errors)


def second_is_kept(server: Served, good: bytes) -> bool:
    words = Path(f"/proc/{children(server, 'front')[0]}/cmdline").read_bytes().decode()
    kept = Path(words.partition('"kept_keys":"')[2].partition('"')[0])
    # Nobody else on this machine may read whose keys they are.
    return kept.read_bytes() == good and kept.parent.stat().st_mode & 0o077 == 0


def test_a_copy_is_read_only_where_the_file_cannot_be(place: Path) -> None:
    first = new_key(place, "acme")["authorization"].split()[1]
    file, kept = place / "keys.json", place / "kept.json"
    Keys.open(file, kept=kept)
    assert not kept.exists()
    Keys.open(file, kept=kept, keeps=True)
    second = new_key(place, "acme")["authorization"].split()[1]
    both = Keys.open(file, kept=kept)
    assert both.access(second).allows("acme") and both.refused is None
    file.write_text("{")
    before = Keys.open(file, kept=kept)
    assert before.access(first).allows("acme") and "keys.json" in str(before.refused)
    with pytest.raises(Exception, match="not known"):
        before.access(second)


def test_an_engine_waits_for_a_store_that_is_away(place: Path) -> None:
    url = f"file://{place}/customers"
    options = ("--threads", 1, "--processes", 2, "--poll-seconds", 0.2)
    with Served("bundle", "--customers", url, *options, cwd=place) as server:
        assert metric(server.url, "qrlora_store_up") == 1 and metric(server.url, "qrlora_store_customers") == 4
        assert metric(server.url, "qrlora_store_failures_total") == 0
        assert 0 <= metric(server.url, "qrlora_store_listing_age_seconds") < 20
        shutil.move(place / "customers", place / "elsewhere")
        until(lambda: metric(server.url, "qrlora_store_up") == 0)
        failures = metric(server.url, "qrlora_store_failures_total")
        os.kill(children(server, "engine")[0], signal.SIGKILL)
        until(lambda: sum("there is no such place" in line for line in server.errors) > 2)
        assert not is_ready(server.url) and ask(server.url).status_code == 503
        assert ask(server.url).headers["retry-after"] == "1"
        shutil.move(place / "elsewhere", place / "customers")
        until(lambda: is_ready(server.url))
        assert ask(server.url).status_code == 200
        until(lambda: metric(server.url, "qrlora_store_up") == 1)
        assert metric(server.url, "qrlora_store_failures_total") >= failures > 0
    assert server.end() == 0


def ask(url: str) -> Any:
    return httpx.post(f"{url}/v1/classify", json={"texts": TEXTS[:1], "customer": "acme"}, timeout=20)
