"""`qrlora-deploy serve` with customers in an object store."""

import importlib.util
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httpx", reason="needs the extra client")

import httpx

from qrlora_deploy.client import BadRequestError, Client, NotFoundError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from tests.cli.running import run_here, succeed_here
from tests.serving.process import Served


@pytest.fixture
def place(tmp_path: Path, switchable: Path, exported: Path, customers: dict[str, Coefficients]) -> Path:
    """A bundle, a merged one, and two customers under `objects`."""
    shutil.copytree(switchable, tmp_path / "bundle")
    shutil.copytree(exported, tmp_path / "merged")
    for name in ("acme", "gamma"):
        (tmp_path / "objects").mkdir(exist_ok=True)
        write_coefficients(customers[name], tmp_path / "objects" / f"{name}.safetensors")
    return tmp_path


def soon(what: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_objects_are_served_and_followed(place: Path, customers: dict[str, Coefficients]) -> None:
    options = ("--customers", f"file://{place}/objects", "--poll-seconds", 0.1)
    with Served("bundle", *options, cwd=place) as server, Client(server.url) as client:

        def digest(customer: str) -> str | None:
            try:
                return client.classify(["where is it"], customer)[0].customer_digest
            except NotFoundError:
                return None

        def metric(name: str) -> float:
            found = re.search(rf'^{name}{{model="bundle"}} (\S+)$', httpx.get(f"{server.url}/metrics").text, re.M)
            assert found is not None
            return float(found[1])

        assert digest("acme") == customers["acme"].digest and digest("gamma") == customers["gamma"].digest
        assert digest("delta") is None
        with pytest.raises(BadRequestError, match="is no customer id"):
            digest("../bundle/base_head")
        assert metric("qrlora_store_up") == 1 and metric("qrlora_store_customers") == 2
        assert metric("qrlora_store_failures_total") == 0 and 0 <= metric("qrlora_store_listing_age_seconds") < 30
        write_coefficients(customers["delta"], place / "objects" / "delta.safetensors")
        write_coefficients(customers["beta"], place / "objects" / "acme.safetensors")
        (place / "objects" / "gamma.safetensors").unlink()
        soon(lambda: digest("delta") == customers["delta"].digest)
        soon(lambda: digest("acme") == customers["beta"].digest)
        soon(lambda: digest("gamma") is None)
        shutil.move(place / "objects", place / "elsewhere")
        soon(lambda: metric("qrlora_store_listing_age_seconds") > 1)
        assert digest("acme") == customers["beta"].digest, "a place that has gone takes nobody away"
    said = [line for line in server.errors if "no such place" in line]
    assert len(said) == 1 and "what is loaded goes on being served" in said[0]


@pytest.mark.parametrize("where", ["file://{}/objects", "{}/objects"])
def test_a_place_that_vanishes_is_no_unknown_customer(place: Path, where: str) -> None:
    options = ("--customers", where.format(place), "--poll-seconds", 60, "--grpc-port", 0)
    with Served("bundle", *options, cwd=place) as server:

        def ask(customer: str) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/classify", json={"texts": ["where"], "customer": customer}, timeout=30)

        assert ask("acme").status_code == 200
        shutil.move(place / "objects", place / "elsewhere")
        for _ in range(5):
            reply = ask("gamma")
            assert reply.status_code == 503 and int(reply.headers["retry-after"]) >= 1, reply.text
            assert str(place) not in reply.text and "try again soon" in reply.text
        assert ask("acme").status_code == 200
        shutil.move(place / "elsewhere", place / "objects")
        soon(lambda: ask("gamma").status_code == 200)
        (place / "objects" / "gamma.safetensors").unlink()
        assert ask("nobody").status_code == 404
    said = [line for line in server.errors if "what is loaded goes on being served" in line]
    assert len(said) == 1, server.errors


def test_check_reads_every_object(place: Path) -> None:
    url = f"file://{place}/objects"
    ran = run_here("serve", "bundle", "--customers", url, "--check", "--port", 0, "--json", cwd=place)
    assert ran.code == 0 and ran.json["models"] == [{"model": "bundle", "customers": 2, "problems": []}]
    (place / "objects" / "beta.safetensors").write_bytes(b"nothing")
    ran = run_here("serve", "bundle", "--customers", f"bundle={url}", "--check", "--port", 0, cwd=place)
    assert ran.code == 1 and "1 customers cannot be served: beta:" in ran.err


REFUSED = {
    "a web page": ("--customers https://example.com/customers", "a URL of s3, s3a, gs"),
    "a cache": ("--customers simplecache::s3://bucket/x", "is no place of customers"),
    "a key": ("--customers s3://me:secret@bucket/x", "keys of a store come from the environment"),
    "a query": ("--customers memory://x?y=z", "more than a bucket and a prefix"),
    "a place that is not there": ("--customers file:///no/such/place", "file:///no/such/place: there is no such place"),
    "a merged bundle": ("--model m=merged --customers m=memory://x", "takes no others"),
    "never": ("--customers memory://x --poll-seconds 0", "--poll-seconds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line(place: Path, name: str) -> None:
    line, words = REFUSED[name]
    ran = run_here("serve", "bundle", "--port", 0, *line.split(), cwd=place)
    assert ran.code == 2 and words in ran.err, ran.err
    assert len(ran.err.strip().splitlines()) == 1 and "secret" not in ran.err


def test_a_missing_package_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    for url, module, remedy in (
        ("gs://bucket/x", "gcsfs", "pip install gcsfs"),
        ("az://container/x", "adlfs", "pip install adlfs"),
        ("memory://x", "fsspec", "pip install 'qrlora-deploy[store]'"),
    ):

        def without(name: str, package: str | None = None, gone: str = module) -> object:
            return None if name == gone else find(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", without)
        ran = run_here("serve", "bundle", "--port", 0, "--customers", url, cwd=place)
        assert ran.code == 2 and f"needs {module}, which is not installed; {remedy}" in ran.err


def test_the_admin_api_changes_no_objects(place: Path) -> None:
    succeed_here(["keys", "add", "keys.json", "--customer", "*", "--admin"], place)
    line = "--keys keys.json --audit-log audit.jsonl --admin-port 0"
    ran = run_here("serve", "bundle", "--customers", f"file://{place}/objects", *line.split(), "--port", 0, cwd=place)
    assert ran.code == 2 and "those of an object store are changed there; give a folder by --customers" in ran.err
