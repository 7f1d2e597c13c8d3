"""`serve --admin-port`: a customer that is put through it answers, on the other port, without a restart."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httpx", reason="needs the extra client")

import httpx

from qrlora_deploy.client import Client, NotFoundError
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from tests.cli.running import environment, run, succeed_here

ADMIN = "--keys keys.json --admin-port 0 --audit-log audit.jsonl"
SERVE = "serve bundle --customers customers --port 0 --threads 1"


@pytest.fixture
def place(tmp_path: Path, switchable: Path, tiny_customer: Coefficients) -> Path:
    """A bundle, an empty folder of customers, and two files for it."""
    (tmp_path / "bundle").symlink_to(switchable)
    (tmp_path / "customers").mkdir()
    write_coefficients(tiny_customer, tmp_path / "one.safetensors")
    other = replace(tiny_customer, values=tiny_customer.values * np.float32(-2))
    write_coefficients(other, tmp_path / "two.safetensors")
    return tmp_path


@contextmanager
def serving(place: Path) -> Iterator[tuple[str, str]]:
    """The addresses of a server and of its admin API."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qrlora_deploy.cli", *SERVE.split(), *ADMIN.split()],
        stdout=subprocess.PIPE,
        text=True,
        cwd=place,
        env=environment(),
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().split()[-1]
        yield url, f"http://127.0.0.1:{process.stdout.readline().split()[-1]}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_customers_change_while_the_server_runs(place: Path) -> None:
    admin = succeed_here(["keys", "add", "keys.json", "--admin"], place)["key"]
    acme = succeed_here(["keys", "add", "keys.json", "--customer", "acme"], place)["key"]
    with serving(place) as (url, admin_url), Client(url, acme) as client:
        headers = {"authorization": f"Bearer {admin}"}
        (model,) = httpx.get(f"{admin_url}/v1/models", headers=headers).json()["models"]
        path = f"{admin_url}/v1/models/{model}/customers/acme"
        with pytest.raises(NotFoundError):
            client.classify(["a"], "acme")
        assert httpx.put(path, content=b"", headers={"authorization": f"Bearer {acme}"}).status_code == 403
        for name in ("one", "two"):
            content = (place / f"{name}.safetensors").read_bytes()
            assert httpx.put(path, content=content, headers=headers).status_code == 200
            answers_as(client, read_coefficients(place / f"{name}.safetensors").digest)
        assert httpx.post(f"{path}/rollback", headers=headers).status_code == 200
        answers_as(client, read_coefficients(place / "one.safetensors").digest)
    assert len((place / "audit.jsonl").read_text().splitlines()) == 3


def answers_as(client: Client, digest: str) -> None:
    """Wait until this version of acme answers: a folder is followed within moments."""
    end = time.monotonic() + 30
    while client.classify(["a"], "acme")[0].customer_digest != digest:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--admin-port 0", "--keys FILE and --audit-log FILE"),
        ("--audit-log audit.jsonl", "does nothing without --admin-port"),
        (f"{ADMIN} --audit-log no/such/folder.jsonl", "audit log"),
    ],
)
def test_what_is_missing_is_said(place: Path, options: str, line: str) -> None:
    succeed_here(["keys", "add", "keys.json", "--admin"], place)
    ran = run(*SERVE.split(), *options.split(), cwd=place)
    assert ran.code and line in ran.err and "Traceback" not in ran.err


def test_an_admin_api_needs_a_folder(place: Path) -> None:
    succeed_here(["keys", "add", "keys.json", "--admin"], place)
    ran = run("serve", "bundle", "--port", "0", *ADMIN.split(), cwd=place)
    assert ran.code == 2 and "--customers DIR" in ran.err
