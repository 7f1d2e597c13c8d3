"""Keys: what a file of them says, whatever is in it, and what a key lets one ask for."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import FileFormatError, QrloraError
from qrlora_deploy.serving import access
from qrlora_deploy.serving.access import Keys, key_of, open_access
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.keys_file import KeysFile, Quota, empty_keys, read_keys, with_key, write_keys
from qrlora_deploy.serving.refusals import ForbiddenError, QuotaError, UnauthenticatedError, status_of
from tests.cli.running import environment, run_here, succeed_here
from tests.damaging import damaged_json


def filled() -> tuple[KeysFile, dict[str, str]]:
    """A file of keys, and the keys by what they are for."""
    keys = empty_keys().model_copy(
        update={"groups": {"eu": ["acme", "bolt"]}, "quotas": {"*": Quota(rows_per_second=5)}}
    )
    made = {}
    for name, customers, groups, more in (
        ("acme", ["acme"], [], {}),
        ("again", ["acme"], [], {"note": "the second one"}),
        ("eu", ["solo"], ["eu"], {}),
        ("all", ["*"], [], {}),
        ("admin", [], [], {"admin": True}),
        ("old", ["acme"], [], {"expires": "2020-01-01"}),
        ("ahead", ["acme"], [], {"expires": "2999-01-01T00:00:00+02:00"}),
    ):
        keys, _, made[name] = with_key(keys, customers, groups, **more)
    return keys, made


FILLED = filled()


def near(key: str) -> st.SearchStrategy[str]:
    """Keys with one character that may be another one."""
    places = st.integers(0, len(key) - 1)
    return st.builds(lambda at, other: key[:at] + other + key[at + 1 :], places, st.characters(codec="ascii"))


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    keys, made = filled()
    write_keys(keys, tmp_path / "keys.json")
    return tmp_path / "keys.json", made


def test_a_key_allows_its_customers_and_no_others(place: tuple[Path, dict[str, str]]) -> None:
    path, made = place
    keys = Keys.open(path)
    allowed = {
        name: [it for it in ("acme", "bolt", "solo", "none") if keys.access(key).allows(it)]
        for name, key in made.items()
        if name != "old"
    }
    assert allowed == {
        "acme": ["acme"],
        "again": ["acme"],
        "ahead": ["acme"],
        "eu": ["acme", "bolt", "solo"],
        "all": ["acme", "bolt", "solo", "none"],
        "admin": [],
    }
    assert all(keys.access(made[name]).allows(None) for name in allowed)
    assert {name for name in allowed if keys.access(made[name]).admin} == {"admin"}
    keys.access(made["admin"]).check_admin()
    for plain in (keys.access(made["all"]), open_access):
        with pytest.raises(ForbiddenError):
            plain.check_admin()


def test_what_is_no_key_is_refused(place: tuple[Path, dict[str, str]]) -> None:
    path, made = place
    keys = Keys.open(path)
    right = made["acme"]
    other = right[:-1] + ("A" if right[-1] != "A" else "B")
    swapped = made["acme"][:16] + made["all"][16:]
    for wrong in (None, "", "x", "qd_", "qd__", right[:-1], right + "x", other, swapped, "\ud800", "qd_" + "9" * 10**6):
        with pytest.raises(UnauthenticatedError) as caught:
            keys.access(wrong)
        assert status_of(caught.value).http == 401 and right not in str(caught.value)
    with pytest.raises(UnauthenticatedError, match="not known or has expired"):
        keys.access(made["old"])
    # Whom an unknown key is compared with has a hash of zeros; nobody is let in by it.
    with pytest.raises(UnauthenticatedError):
        keys.access("qd_000000000000_")


def test_the_file_holds_salted_hashes_alone(place: tuple[Path, dict[str, str]]) -> None:
    path, made = place
    text = path.read_text()
    stored = json.loads(text)
    for name, key in made.items():
        assert key not in text and key.rpartition("_")[2] not in text, name
    salted = hashlib.sha256(bytes.fromhex(stored["salt"]) + made["acme"].encode()).hexdigest()
    assert stored["keys"][0]["hash"] == salted
    assert stored["salt"] != filled()[0].salt


def test_a_header_brings_a_key() -> None:
    assert key_of("Bearer qd_1_2") == key_of("bearer  qd_1_2 ") == "qd_1_2"
    assert [key_of(it) for it in (None, "", "Bearer", "Bearer ", "Basic eDp5", "qd_1_2")] == [None] * 6


def test_a_new_file_is_taken_and_a_damaged_one_is_told_once(
    place: tuple[Path, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    path, made = place
    told: list[Keys] = []
    keys = Keys.open(path, told.append)
    assert not keys.reload()
    with caplog.at_level(logging.WARNING, logger=access.__name__):
        path.write_text("{")
        assert [keys.reload(), keys.reload(), keys.reload()] == [False] * 3
        path.unlink()
        assert not keys.reload() and not keys.reload()
    assert len(caplog.records) == 2
    for record in caplog.records:
        line = record.getMessage()
        assert str(path) in line and "go on" in line and "\n" not in line
    assert keys.access(made["acme"]).allows("acme") and not told
    changed, _, new = with_key(empty_keys(), ["bolt"], [])
    write_keys(changed, path)
    assert keys.reload() and told == [keys]
    assert keys.access(new).allows("bolt") and keys.quotas() == ({}, None, {})
    with pytest.raises(UnauthenticatedError):
        keys.access(made["acme"])


def test_a_change_is_found_while_keys_are_asked_for(
    place: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = place
    monkeypatch.setattr(access, "LOOK_S", 0.01)
    keys = Keys.open(path)
    succeed_here(["keys", "revoke", path, made["acme"].split("_")[1]], path.parent)
    end = time.monotonic() + 20
    with pytest.raises(UnauthenticatedError):
        while time.monotonic() < end:
            keys.access(made["acme"])
            time.sleep(0.01)
    assert keys.access(made["again"]).allows("acme")


def test_quotas_are_by_customer(tmp_path: Path) -> None:
    numbers = {"acme": {"rows_per_second": 10.0, "burst": 50.0}, "bolt": {"rows_per_second": 4}}
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(empty_keys().model_dump() | {"quotas": numbers | {"*": {"rows_per_second": 2}}}))
    found = Keys.open(path).quotas()
    assert found == ({"acme": 10.0, "bolt": 4.0}, 2.0, {"acme": 50.0})
    quotas = Quotas(*found)
    quotas.take({"acme": 50, "bolt": 4, "anyone": 2})
    with pytest.raises(QuotaError):
        quotas.take({"acme": 50})
    path.write_text(json.dumps(empty_keys().model_dump()))
    assert Keys.open(path).quotas() == ({}, None, {})


WRONG = {
    "no file of keys": {"format": "qrlora-gate"},
    "version": {"format_version": 2},
    "version of another type": {"format_version": True},
    "short salt": {"salt": "00"},
    "unknown field": {"key": []},
    "quota of nothing": {"quotas": {"acme": {"rows_per_second": 0}}},
    "quota of text": {"quotas": {"acme": {"rows_per_second": "10"}}},
    "a burst of everyone": {"quotas": {"*": {"rows_per_second": 1, "burst": 2}}},
    "quota of a path": {"quotas": {"../acme": {"rows_per_second": 1}}},
    "group of a path": {"groups": {"eu": ["a/b"]}},
    "group without a name": {"groups": {"": ["a"]}},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(filled()[0].model_dump() | change))
    with pytest.raises(FileFormatError, match="keys.json"):
        read_keys(path)


KEY_WRONG: dict[str, dict[str, object]] = {
    "admin by text": {"admin": "true"},
    "admin by number": {"admin": 1},
    "no time": {"expires": "soon"},
    "time as a number": {"expires": 4102444800},
    "hash of another length": {"hash": "ab"},
    "all by a pattern": {"customers": ["ac*"]},
    "a text for a list": {"customers": "*"},
    "no such group": {"groups": ["us"]},
    "the id of another": {"id": "1" * 12},
}


@pytest.mark.parametrize("change", KEY_WRONG.values(), ids=KEY_WRONG)
def test_a_key_that_says_something_else_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    record = filled()[0].model_dump()
    record["keys"][1]["id"] = "1" * 12
    record["keys"][0] |= change
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(record))
    with pytest.raises(FileFormatError, match="keys.json"):
        read_keys(path)


def test_a_right_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps(filled()[0].model_dump())
    path = tmp_path / "keys.json"
    path.write_text(text.replace('"admin": false', '"admin": false, "admin": true', 1))
    with pytest.raises(FileFormatError, match="'admin' twice"):
        read_keys(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chance=st.randoms(use_true_random=False))
def test_a_damaged_file_lets_nobody_in_who_was_not(tmp_path: Path, chance) -> None:  # type: ignore[no-untyped-def]
    keys, made = filled()
    path = tmp_path / f"{os.getpid()}.json"
    path.write_bytes(damaged_json(json.dumps(keys.model_dump()), chance))
    try:
        opened = Keys.open(path)
    except QrloraError as error:
        assert len(str(error)) <= 500 and "\n" not in str(error)
        return
    # What is read is what is written there: the right of a key never comes from another type.
    record = json.loads(path.read_bytes())
    stored = {key["id"]: key for key in record.get("keys", [])}
    everyone = {"acme", "bolt", "solo", "x"}
    for key in made.values():
        try:
            found = opened.access(key)
        except UnauthenticatedError:
            continue
        it = stored[found.key_id]
        groups = [record["groups"][name] for name in it.get("groups", [])]
        names = {*it.get("customers", []), *(name for group in groups for name in group)}
        assert found.admin is it.get("admin", False)
        assert {name for name in everyone if found.allows(name)} == (everyone if "*" in names else names & everyone)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_what_is_no_file_of_keys_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        read_keys(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(key=st.one_of(st.text(max_size=80), st.sampled_from(sorted(FILLED[1].values())).flatmap(near)))
def test_no_other_text_is_a_key(key: str) -> None:
    state = access._State.of(FILLED[0])
    assert (state.verified(key) is not None) == (key in FILLED[1].values() and key != FILLED[1]["old"])


def test_the_command_line_adds_lists_and_revokes(tmp_path: Path) -> None:
    first = succeed_here(["keys", "add", "keys.json", "--customer", "acme", "--note", "Ann"], tmp_path)
    second = succeed_here(["keys", "add", "keys.json", "--admin", "--expires", "2999-12-31"], tmp_path)
    keys = Keys.open(tmp_path / "keys.json")
    assert keys.access(first["key"]).allows("acme") and keys.access(second["key"]).admin
    listed = succeed_here(["keys", "list", "keys.json"], tmp_path)
    assert [(key["id"], key["note"], key["admin"]) for key in listed["keys"]] == [
        (first["id"], "Ann", False),
        (second["id"], "", True),
    ]
    shown = run_here("keys", "list", "keys.json", cwd=tmp_path).out
    stored = json.loads((tmp_path / "keys.json").read_text())["keys"][0]
    assert first["id"] in shown and stored["hash"] not in shown + json.dumps(listed)
    assert succeed_here(["keys", "revoke", "keys.json", first["id"]], tmp_path)["keys"] == 1
    keys.reload()
    with pytest.raises(UnauthenticatedError):
        keys.access(first["key"])


def test_keys_that_are_added_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "qrlora_deploy.cli", "keys", "add", "keys.json", "--customer", f"c{number}"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
        )
        for number in range(6)
    ]
    assert [command.wait(120) for command in commands] == [0] * 6
    assert {key.customers[0] for key in read_keys(tmp_path / "keys.json").keys} == {f"c{number}" for number in range(6)}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["add", "keys.json"], "allow nothing"),
        (["add", "keys.json", "--customer", "../acme"], "no customer id"),
        (["add", "keys.json", "--group", "eu"], "'eu'"),
        (["add", "keys.json", "--customer", "acme", "--expires", "soon"], "2027-12-31"),
        (["add", "other.json", "--customer", "acme"], "not a file of keys"),
        (["revoke", "right.json", "000000000000"], "right.json: no key has the id"),
    ],
)
def test_the_command_line_refuses_in_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    (tmp_path / "other.json").write_text("{}")
    write_keys(filled()[0], tmp_path / "right.json")
    ran = run_here("keys", *arguments, cwd=tmp_path)
    assert ran.code == 2 and line in ran.err and ran.err.count("\n") == 1 and not ran.out
    assert not (tmp_path / "keys.json").exists()
