"""A storm of requests with keys, while the admin API changes customers and the file of keys changes underneath.

    QRLORA_STORM=10000 pytest -m slow tests/serving/storm

Nobody without a key is answered, a key never gets another customer, an ended key is refused within a bound, an erased
customer is gone, and every answer is the session's own.
"""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.tokenizing import RowTokenizer
from tests.serving.engine.place import alone
from tests.serving.process import Served
from tests.serving.storm.asking import INFER, SENTENCES, Expected, Rows, Tally, hostile_http, logits_of_json
from tests.serving.storm.changing_keys import BOUND_S, ChangingKeys, Ticket
from tests.serving.test_processes import children, httpx, is_ready, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REQUESTS = int(os.environ.get("QRLORA_STORM", "1500"))
THREADS = 5
KINDS = {"one process": (), "two fronts": ("--processes", 2)}
NAMES = tuple(f"c{number}" for number in range(8))
ERASED = ("c6", "c7")
"""Erased in the middle, for good."""


@pytest.fixture
def versions(customers: dict[str, Coefficients]) -> dict[str, list[Coefficients]]:
    """Three of each customer, and of no two the same."""
    acme, chance = customers["acme"], np.random.default_rng(3)
    scales = iter(chance.uniform(0.2, 1.5, 3 * len(NAMES)).astype(np.float32))
    return {name: [replace(acme, values=acme.values * next(scales)) for _ in range(3)] for name in NAMES}


@pytest.fixture
def place(tmp_path: Path, switchable: Path, versions: dict[str, list[Coefficients]]) -> Path:
    shutil.copytree(switchable, tmp_path / "bundle")
    for folder in ("customers", "files"):
        (tmp_path / folder).mkdir()
    for name, three in versions.items():
        write_coefficients(three[0], tmp_path / "customers" / f"{name}.safetensors")
        for number, version in enumerate(three):
            write_coefficients(version, tmp_path / "files" / f"{name}-{number}")
    return tmp_path


@pytest.fixture
def expected(switchable: Path, versions: dict[str, list[Coefficients]]) -> Expected:
    """What one session says of each version, a text at a time."""
    session = SwitchableSession(open_bundle(switchable), threads=1)
    tokenizer = RowTokenizer(session.bundle)
    rows = tokenizer.rows(list(SENTENCES), None, ["c0"] * len(SENTENCES))
    found: dict[tuple[str | None, str], dict[str, np.ndarray]] = {}
    for name, three in versions.items():
        for version in three:
            session.load("c0", version)
            found[name, version.digest] = {text: alone(session, row) for text, row in zip(SENTENCES, rows, strict=True)}
    return found


class Storm:
    """Clients until as many requests were made."""

    def __init__(self, server: Served, expected: Expected, keys: ChangingKeys) -> None:
        self.server, self.expected, self.keys = server, expected, keys
        self.tally, self.lock, self.made, self.lost = Tally(), threading.Lock(), 0, 0
        self.erased: dict[str, float] = {}
        self.kills: list[float] = []
        self.threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(THREADS)]
        for thread in self.threads:
            thread.start()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()

    def _ask(self, seed: int) -> None:
        chance = random.Random(seed)
        while self.made < REQUESTS:
            begin = time.monotonic()
            try:
                # Another front each time, by a connection of its own.
                with httpx.Client(base_url=self.server.url, timeout=60) as client:
                    for _ in range(10):
                        begin = time.monotonic()
                        chance.choice(
                            (self._good, self._good, self._good, self._foreign, self._without, self._hostile)
                        )(client, chance)
            except httpx.TransportError as error:
                self.lost += 1
                if not any(begin - 1 < killed < time.monotonic() + 1 for killed in self.kills):
                    self._wrong(f"lost without a killed process: {error!r}")
                time.sleep(0.01)

    def _wrong(self, what: str) -> None:
        with self.lock:
            self.tally.wrong.append(what)

    def _ticket(self, chance: random.Random) -> Ticket:
        """A key: mostly one that holds, else any of the last ones."""
        holding = self.keys.holding()
        with self.keys.lock:
            return chance.choice(holding if holding and chance.random() < 0.7 else self.keys.tickets[-12:])

    def _post(self, client: Any, rows: Rows, key: str) -> Any:
        self.made += 1
        headers = {"authorization": f"Bearer {key}"} if key else {}
        reply = client.post(INFER, content=rows.as_json(False), headers=headers)
        with self.lock:
            self.tally.count("http", reply.status_code)
        return reply

    def _good(self, client: Any, chance: random.Random) -> None:
        """A key asks for its own customers."""
        ticket = self._ticket(chance)
        count = chance.choice((1, 1, 3, 9))
        rows = Rows(chance.choices(SENTENCES, k=count), chance.choices(ticket.customers, k=count))
        begin = time.monotonic()
        reply = self._post(client, rows, ticket.key)
        end = time.monotonic()
        said = ticket.judge(reply.status_code, begin, end)
        if reply.status_code == 200:
            self.keys.answered(ticket, begin)
            late = [name for name in rows.customers if begin > self.erased.get(str(name), begin) + BOUND_S]
            said = said or (f"{late} were answered after they were erased" if late else "")
            with self.lock:
                rows.compare(*logits_of_json(reply.content), self.expected, self.tally)
        elif reply.status_code not in (401, 404, 429, 503):
            said = f"{reply.status_code} to a valid request: {reply.text}"
        elif reply.status_code == 404 and not self._may_be_missing(rows):
            said = f"404 for {rows.customers}, who are there"
        if said:
            self._wrong(said)

    def _may_be_missing(self, rows: Rows) -> bool:
        # c0 and c1 are swapped and rolled back, and never away.
        return bool(set(rows.customers) - {"c0", "c1"})

    def _foreign(self, client: Any, chance: random.Random) -> None:
        """A key asks for somebody else, alone or beside its own: nobody is told anything."""
        ticket = self._ticket(chance)
        other = chance.choice([*(name for name in NAMES if name not in ticket.customers), "nobody"])
        rows = Rows(SENTENCES[:2], [chance.choice((other, *ticket.customers)), other])
        reply = self._post(client, rows, ticket.key)
        if reply.status_code not in (401, 404, 429, 503) or any(text in reply.text for text in ("logits", "digest")):
            self._wrong(f"{reply.status_code} {reply.text[:200]} to a key of {ticket.customers} for {rows.customers}")

    def _without(self, client: Any, chance: random.Random) -> None:
        """No key, or one that is none."""
        with self.keys.lock:
            key = self.keys.tickets[-1].key
        wrong = chance.choice(("", "qd_000000000000_x", key[:-1], key.upper(), f"{key}x", "x" * 5000))
        reply = self._post(client, Rows(SENTENCES[:1], [chance.choice(NAMES)]), wrong)
        if reply.status_code not in (401, 431):
            self._wrong(f"{reply.status_code} {reply.text[:200]} to {wrong[:40]!r}")

    def _hostile(self, client: Any, chance: random.Random) -> None:
        """Whatever it is, it has no key."""
        self.made += 1
        method, path, body, headers = hostile_http(chance)
        reply = client.request(method, path, content=body, headers=headers)
        with self.lock:
            self.tally.count("http", reply.status_code)
        open_to_all = method == "GET" and path == "/"
        if not (400 <= reply.status_code < 500 or open_to_all):
            self._wrong(f"{reply.status_code} {reply.text[:200]} to {method} {path} {headers}")


class Admin:
    """Whoever changes customers by the admin API."""

    def __init__(self, server: Served, key: str, place: Path) -> None:
        self.url, self.place = f"http://127.0.0.1:{server.ports['--admin-port']}", place
        self.headers = {"authorization": f"Bearer {key}"}

    def ask(self, method: str, path: str, codes: tuple[int, ...] = (200,), **more: Any) -> int:
        """A change; its status, which is one of these. Where the engine was killed, it is tried again."""
        deadline = time.monotonic() + 60
        while True:
            try:
                reply = httpx.request(method, f"{self.url}{path}", headers=self.headers, timeout=60, **more)
                if reply.status_code != 503:
                    assert reply.status_code in codes, (method, path, reply.status_code, reply.text)
                    return int(reply.status_code)
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def put(self, name: str, number: int) -> None:
        content = (self.place / "files" / f"{name}-{number}").read_bytes()
        self.ask("PUT", f"/v1/models/bundle/customers/{name}", content=content)


def disturb(server: Served, keys: ChangingKeys, admin: Admin, storm: Storm) -> Iterator[str]:
    """One change after the other; what it was."""
    chance, engines = random.Random(7), 1
    for number in range(10**6):
        name = chance.choice(NAMES[:6])
        customer = f"/v1/models/bundle/customers/{name}"
        step = number % 12
        if step in (0, 5):
            admin.put(name, chance.randrange(3))
            yield "put"
        elif step == 1:
            admin.ask("POST", f"{customer}/rollback", (200, 404, 409, 422), json={})
            yield "roll back"
        elif step == 2:
            keys.add(chance.sample(NAMES, chance.randint(1, 3)), chance.choice((None, None, 1.0, 3.0)))
            yield "a new key"
        elif step == 3:
            gone = chance.choice(("c2", "c3", "c4", "c5"))
            admin.ask("DELETE", f"/v1/models/bundle/customers/{gone}", (200, 404))
            yield "delete"
            admin.put(gone, chance.randrange(3))
        elif step == 4 and len(keys.holding()) > 3:
            keys.revoke(chance.choice(keys.holding()))
            yield "a revoked key"
        elif step == 6:
            admin.ask("POST", "/v1/reload")
            yield "reload"
        elif step == 7:
            keys.damage()
            yield "a damaged file of keys"
            keys.write()
        elif step == 8 and number > 12 and len(storm.erased) < len(ERASED):
            gone = ERASED[len(storm.erased)]
            admin.ask("DELETE", f"/v1/models/bundle/customers/{gone}?erase=true", (200, 404))
            storm.erased[gone] = time.monotonic()
            yield "erase"
        elif step == 9 and children(server, "front"):
            storm.kills.append(time.monotonic())
            os.kill(chance.choice(children(server, "front")), signal.SIGKILL)
            until(lambda: len(children(server, "front")) == 2)
            yield "a killed front"
        elif step == 10 and number > 24 and engines and children(server, "engine"):
            # Once: the second time within ten minutes ends the server.
            engines = 0
            storm.kills.append(time.monotonic())
            os.kill(children(server, "engine")[0], signal.SIGKILL)
            until(lambda: is_ready(server.url))
            yield "a killed engine"
        elif step == 11:
            server.send(signal.SIGHUP)
            yield "a signal to reload"


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_customers_change_underneath(
    place: Path, versions: dict[str, list[Coefficients]], expected: Expected, kind: str
) -> None:
    keys = ChangingKeys(place / "keys.json")
    keys.write()
    for name in NAMES:
        keys.add([name])
    keys.add(["c0", "c1"])
    keys.add(["c0", "c1", "c2", "c7"])
    options = [
        "--customers",
        "customers",
        "--threads",
        "1",
        "--keys",
        "keys.json",
        "--audit-log",
        "audit.jsonl",
        "--admin-port",
        "0",
    ]
    done: list[str] = []
    with Served("bundle", *options, *KINDS[kind], cwd=place) as server:
        admin = Admin(server, keys.admin, place)
        storm = Storm(server, expected, keys)
        for what in disturb(server, keys, admin, storm):
            done.append(what)
            time.sleep(0.1)
            if storm.made >= REQUESTS and storm.erased.keys() == set(ERASED):
                break
        storm.join()
        keys.write()
        time.sleep(BOUND_S)
        _settled(server, keys, expected)
        assert server.end() == 0, server.errors[-5:]
    tally = storm.tally
    told = {what: done.count(what) for what in sorted(set(done))}
    print(kind, tally.codes, f"{tally.rows} rows, {storm.lost} lost with a process, {keys.latest_s:.1f} s", told)
    assert not tally.wrong, (len(tally.wrong), tally.wrong[:10])
    assert tally.rows > storm.made / 4 and len(tally.seen) > len(NAMES), tally
    assert {"put", "delete", "erase", "roll back", "reload", "a new key", "a revoked key"} <= told.keys()
    assert bool(children_killed := {"a killed front"} & told.keys()) == (kind != "one process"), children_killed
    assert not any("Traceback" in line for line in server.errors), server.errors
    assert not any(ticket.key in line for ticket in keys.tickets for line in server.errors)


def _settled(server: Served, keys: ChangingKeys, expected: Expected) -> None:
    """Once all is calm: each key that holds is answered, each that ended is not, and who was erased is gone."""
    last = Tally()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for ticket in keys.tickets:
            for name in ticket.customers:
                rows = Rows(SENTENCES, [name] * len(SENTENCES))
                headers = {"authorization": f"Bearer {ticket.key}"}
                reply = client.post(INFER, content=rows.as_json(False), headers=headers)
                ended = ticket.until is not None
                assert reply.status_code == (401 if ended else 404 if name in ERASED else 200), (ticket, reply.text)
                if reply.status_code == 200:
                    rows.compare(*logits_of_json(reply.content), expected, last)
    assert last.rows and not last.wrong, last.wrong
