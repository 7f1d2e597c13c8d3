"""The admin API: who may, what is changed, what is refused, and that each attempt is told."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs the extra client")

from starlette.testclient import TestClient

from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.access import Keys
from qrlora_deploy.serving.admin import Admin, make_admin_app
from qrlora_deploy.serving.audit import AuditLog
from qrlora_deploy.serving.customer_folder import CustomerFolder
from qrlora_deploy.serving.keys_file import empty_keys, with_key, write_keys

ACME = "/v1/models/tiny/customers/acme"


class Place:
    """An admin API over a folder.

    Attributes:
        folder: of the customers.
        asked: asks, with the admin's key unless another one is given.
        key_id: of the admin's key.
        secrets: the keys.
        reloads: how often it was reloaded.
    """

    def __init__(self, root: Path, session: SwitchableSession) -> None:
        self.folder, self.reloads = root / "customers", 0
        self.folder.mkdir()
        stored, admin, self.admin = with_key(empty_keys(), [], [], admin=True)
        stored, _, self.plain = with_key(stored, ["*"], [])
        write_keys(stored, root / "keys.json")
        self.key_id, self.log = admin.id, root / "audit.jsonl"
        folder = CustomerFolder(self.folder, session.check, keep=3, max_file_bytes=2**18)
        admin_api = Admin({"tiny": folder}, Keys.open(root / "keys.json"), AuditLog(self.log), self._reload)
        self.client = TestClient(make_admin_app(admin_api))

    def _reload(self) -> None:
        self.reloads += 1

    def ask(self, method: str, path: str, key: str | None = "", **more: Any) -> Any:
        """A reply; an empty key is the admin's."""
        key = self.admin if key == "" else key
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return self.client.request(method, path, headers=headers, **more)

    def audit(self) -> list[dict[str, str]]:
        """The lines of the audit log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path, session: SwitchableSession) -> Iterator[Place]:
    yield Place(tmp_path, session)


@pytest.fixture
def content(tmp_path: Path, tiny_customer: Coefficients) -> bytes:
    write_coefficients(tiny_customer, tmp_path / "made.safetensors")
    return (tmp_path / "made.safetensors").read_bytes()


EVERY = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny/customers"),
    ("PUT", ACME),
    ("DELETE", ACME),
    ("GET", f"{ACME}/versions"),
    ("POST", f"{ACME}/rollback"),
    ("POST", "/v1/reload"),
]


@pytest.mark.parametrize(("method", "path"), EVERY)
def test_nothing_answers_without_the_admin_right(place: Place, content: bytes, method: str, path: str) -> None:
    for key, code in ((None, 401), ("qd_000000000000_x", 401), (place.plain, 403)):
        reply = place.ask(method, path, key, content=content if method == "PUT" else None)
        assert reply.status_code == code and "error" in reply.json()
    assert list(place.folder.iterdir()) == [] and place.reloads == 0 and place.audit() == []


def test_a_customer_goes_live_changes_and_goes(place: Place, content: bytes) -> None:
    put = place.ask("PUT", ACME, content=content).json()
    file = place.folder / "acme.safetensors"
    assert file.read_bytes() == content and put["digest"] == read_coefficients(file).digest
    assert place.ask("GET", "/v1/models/tiny/customers").json() == {"customers": ["acme"], "next": None}
    assert place.ask("GET", "/v1/models").json() == {"models": ["tiny"]}
    listed = place.ask("GET", f"{ACME}/versions").json()["versions"]
    assert listed == [{"version": put["version"], "size_bytes": len(content), "current": True}]
    assert place.ask("DELETE", ACME).status_code == 200 and not file.exists()
    assert place.ask("POST", f"{ACME}/rollback", json={"version": put["version"]}).json() == put
    assert file.read_bytes() == content
    assert place.ask("DELETE", f"{ACME}?erase=true").status_code == 200
    assert place.ask("GET", f"{ACME}/versions").status_code == 404
    assert place.ask("POST", "/v1/reload").json() == {"reloaded": True} and place.reloads == 1


def test_a_reload_tells_that_the_keys_file_is_refused(place: Place) -> None:
    keys = place.folder.parent / "keys.json"
    good = keys.read_bytes()
    keys.write_bytes(b"{")
    for _ in range(2):
        reply = place.ask("POST", "/v1/reload")
        assert reply.status_code >= 400 and "the keys that were read before go on" in reply.json()["error"]
    assert place.audit()[-1]["outcome"] != "done"
    keys.write_bytes(good)
    assert place.ask("POST", "/v1/reload").json() == {"reloaded": True}


def test_each_attempt_is_told(place: Place, content: bytes) -> None:
    put = place.ask("PUT", ACME, content=content, params={}).json()
    place.ask("PUT", ACME, content=b"nonsense")
    place.ask("DELETE", f"{ACME}?erase=true")
    place.ask("POST", f"{ACME}/rollback")
    place.ask("POST", "/v1/reload")
    place.ask("GET", f"{ACME}/versions")
    told = place.audit()
    assert [line["action"] for line in told] == ["put", "put", "erase", "rollback", "reload"]
    assert [line["outcome"] == "done" for line in told] == [True, False, True, False, True]
    assert {line["key_id"] for line in told} == {place.key_id}
    assert told[0]["digest"] == put["digest"] and told[0]["version"] == put["version"]
    assert {(line["model"], line["customer"]) for line in told[:4]} == {("tiny", "acme")}
    assert all(line["time"] and line["request_id"] for line in told)
    assert place.admin not in place.log.read_text() and place.log.stat().st_mode & 0o077 == 0


def test_what_cannot_be_told_is_not_done(place: Place, content: bytes) -> None:
    place.log.unlink()
    place.log.mkdir()
    reply = place.ask("PUT", ACME, content=content)
    assert reply.status_code == 500 and list(place.folder.iterdir()) == []


REFUSED = {
    "a damaged file": ("PUT", ACME, {"content": b"nonsense"}, 422),
    "a pickle": ("PUT", ACME, {"content": b"\x80\x04\x95\x00"}, 422),
    "nothing": ("PUT", ACME, {"content": b""}, 422),
    "a file that is too long": ("PUT", ACME, {"content": b"\0" * (2**18 + 1)}, 413),
    "a body that is too long": ("PUT", ACME, {"content": b"\0" * 2**20}, 413),
    "another model": ("PUT", "/v1/models/other/customers/acme", {"content": b""}, 404),
    "a hidden name": ("PUT", "/v1/models/tiny/customers/.versions", {"content": b""}, 400),
    "a path as a name": ("PUT", "/v1/models/tiny/customers/..%2Facme", {"content": b""}, 404),
    "a name of dots": ("PUT", "/v1/models/tiny/customers/%2e%2e", {"content": b""}, 400),
    "a line in a name": ("PUT", "/v1/models/tiny/customers/a%0ab", {"content": b""}, 400),
    "nobody deleted": ("DELETE", ACME, {}, 404),
    "erase by another word": ("DELETE", f"{ACME}?erase=yes", {}, 400),
    "nobody's versions": ("GET", f"{ACME}/versions", {}, 404),
    "nobody rolled back": ("POST", f"{ACME}/rollback", {}, 404),
    "a version of another type": ("POST", f"{ACME}/rollback", {"json": {"version": 1}}, 400),
    "a body of another form": ("POST", f"{ACME}/rollback", {"content": b"[1]"}, 400),
    "a limit of none": ("GET", "/v1/models/tiny/customers?limit=0", {}, 400),
    "a limit without end": ("GET", "/v1/models/tiny/customers?limit=999999999", {}, 400),
    "another method": ("POST", ACME, {}, 405),
    "no such path": ("GET", "/v2/models/tiny/infer", {}, 404),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(place: Place, name: str) -> None:
    method, path, more, code = REFUSED[name]
    reply = place.ask(method, path, **more)
    assert reply.status_code == code
    assert list(reply.json()) == ["error"] and str(place.folder.parent) not in reply.text
    assert list(place.folder.iterdir()) == []


def test_a_version_is_a_name_and_never_a_path(place: Place, content: bytes, tmp_path: Path) -> None:
    place.ask("PUT", ACME, content=content)
    for version in ("../../made", "/etc/passwd", str(tmp_path / "made"), "", "http://host/x"):
        reply = place.ask("POST", f"{ACME}/rollback", json={"version": version})
        assert reply.status_code == 404, version
    assert (place.folder / "acme.safetensors").read_bytes() == content


def test_very_many_customers_are_listed_in_pages(place: Place, content: bytes) -> None:
    for number in range(25):
        (place.folder / f"c{number:02}.safetensors").write_bytes(content)
    found: list[str] = []
    after = ""
    while after is not None:
        page = place.ask("GET", "/v1/models/tiny/customers", params={"after": after, "limit": "10"}).json()
        found += page["customers"]
        after = page["next"]
    assert found == [f"c{number:02}" for number in range(25)]
