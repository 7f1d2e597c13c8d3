"""Customers of a running server, by its admin API: put, rolled back, deleted and erased, while the client asks."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httpx", reason="needs the extra client")

import httpx

from qrlora_deploy.client import Client, NotFoundError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.customers.packed_check import check_packed
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from tests.cli.running import succeed_here
from tests.serving.process import Served

OPTIONS = "--customers customers --packed packed.safetensors --keys keys.json --audit-log audit.jsonl --admin-port 0"


@pytest.fixture
def place(tmp_path: Path, switchable: Path, customers: dict[str, Coefficients]) -> Path:
    """A bundle, an empty folder, acme and beta in a packed file, and files of acme and beta beside it."""
    (tmp_path / "bundle").symlink_to(switchable)
    (tmp_path / "customers").mkdir()
    both = [(name, customers[name]) for name in ("acme", "beta")]
    write_packed(both, tmp_path / "packed.safetensors", open_bundle(switchable).manifest)
    for name, customer in both:
        write_coefficients(customer, tmp_path / f"{name}.safetensors")
    return tmp_path


def soon(what: Callable[[], bool]) -> None:
    """Wait until something is so: a folder is followed within moments."""
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_customers_come_change_and_go(place: Path, customers: dict[str, Coefficients]) -> None:
    key = succeed_here(["keys", "add", "keys.json", "--customer", "*", "--admin"], place)["key"]
    headers = {"authorization": f"Bearer {key}"}
    with Served("bundle", *OPTIONS.split(), cwd=place) as server, Client(server.url, key) as client:
        (model,) = httpx.get(server_url(server, "/v1/models"), headers=headers).json()["models"]

        def admin(method: str, customer: str, rest: str = "", **more: object) -> int:
            url = server_url(server, f"/v1/models/{model}/customers/{customer}{rest}")
            return int(httpx.request(method, url, headers=headers, **more).status_code)

        def digest(customer: str) -> str | None:
            try:
                return client.classify(["where is it"], customer)[0].customer_digest
            except NotFoundError:
                return None

        files = {name: (place / f"{name}.safetensors").read_bytes() for name in ("acme", "beta")}
        assert admin("PUT", "new", content=files["acme"]) == 200
        soon(lambda: digest("new") == customers["acme"].digest)
        assert admin("PUT", "new", content=files["beta"]) == 200
        soon(lambda: digest("new") == customers["beta"].digest)
        assert admin("POST", "new", "/rollback") == 200
        soon(lambda: digest("new") == customers["acme"].digest)
        assert admin("DELETE", "new") == 200
        soon(lambda: digest("new") is None)
        # acme is in the packed file and in the folder; then nowhere.
        assert admin("PUT", "acme", content=files["beta"]) == 200
        soon(lambda: digest("acme") == customers["beta"].digest)
        assert admin("DELETE", "acme", "?erase=true") == 200
        assert digest("acme") is None and admin("GET", "acme", "/versions") == 404
        assert digest("beta") is not None
        assert admin("DELETE", "acme", "?erase=true") == 404
    assert server.end() == 0
    assert check_packed(place / "packed.safetensors").customers == 1
    assert b"acme" not in (place / "packed.safetensors").read_bytes()
    with Served("bundle", *OPTIONS.split(), cwd=place) as server, Client(server.url, key) as client:
        assert client.classify(["where is it"], "beta")
        with pytest.raises(NotFoundError):
            client.classify(["where is it"], "acme")


def server_url(server: Served, path: str) -> str:
    """An address of the admin API."""
    return f"http://127.0.0.1:{server.ports['--admin-port']}{path}"
