"""`qrlora-deploy serve --processes`: quotas and shares of the queue are one for all fronts."""

import json
import threading
import time
from pathlib import Path

from tests.cli.running import run_here
from tests.serving.test_processes import TEXTS, httpx, place, serve

__all__ = ["place"]

RATE, BURST, SECONDS = 10.0, 40.0, 5.0


class Asking(threading.Thread):
    """Asks for a customer until it is told to stop, each time on a new connection: all fronts are met."""

    def __init__(self, url: str, customer: str, texts: list[str], headers: dict[str, str], ends: threading.Event):
        super().__init__()
        self._record = {"texts": texts, "customer": customer}
        self._url, self._headers, self._ends = f"{url}/v1/classify", headers, ends
        self.codes: list[int] = []
        self.retries: list[int] = []
        self.start()

    def run(self) -> None:
        while not self._ends.is_set():
            reply = httpx.post(self._url, json=self._record, headers=self._headers, timeout=30)
            self.codes.append(reply.status_code)
            if reply.status_code == 429:
                self.retries.append(int(reply.headers["retry-after"]))


def test_a_quota_is_one_for_all_fronts(place: Path) -> None:
    key = run_here("keys", "add", "keys.json", "--customer", "*", "--json", cwd=place).json["key"]
    keys = json.loads((place / "keys.json").read_text())
    keys["quotas"] = {"acme": {"rows_per_second": RATE, "burst": BURST}}
    (place / "keys.json").write_text(json.dumps(keys))
    headers = {"authorization": f"Bearer {key}"}
    with serve(place, "--keys", "keys.json", fronts=3) as server:
        start, ends = time.monotonic(), threading.Event()
        asking = [Asking(server.url, "acme", TEXTS[:2], headers, ends) for _ in range(6)]
        free = Asking(server.url, "beta", TEXTS[:2], headers, ends)
        time.sleep(SECONDS)
        ends.set()
        for thread in (*asking, free):
            thread.join(60)
        most = BURST + RATE * (time.monotonic() - start)
        codes = [code for thread in asking for code in thread.codes]
        answered = 2 * codes.count(200)
        # Three quotas would be twice as much, and the burst of three.
        assert BURST <= answered <= most and answered >= 0.8 * (BURST + RATE * SECONDS)
        assert set(codes) == {200, 429} and min(it for thread in asking for it in thread.retries) >= 1
        assert set(free.codes) == {200}
        refused = f'qrlora_rejected_total{{model="bundle",reason="quota"}} {float(codes.count(429))}'
        assert refused in httpx.get(f"{server.url}/metrics", headers=headers).text
    assert server.end() == 0 and server.errors == []


def test_a_share_of_the_queue_is_one_for_all_fronts(place: Path) -> None:
    with serve(place, "--max-queue-rows", 64, fronts=3) as server:
        ends = threading.Event()
        # 24 rows each: of six at a time one has room in a half of the queue, and two would have of three halves.
        greedy = [Asking(server.url, "acme", TEXTS * (24 // len(TEXTS)), {}, ends) for _ in range(6)]
        others = [Asking(server.url, name, TEXTS[:1], {}, ends) for name in ("beta", "gamma")]
        time.sleep(SECONDS)
        ends.set()
        for thread in (*greedy, *others):
            thread.join(60)
        codes = {code for thread in greedy for code in thread.codes}
        assert codes == {200, 429}
        assert {code for thread in others for code in thread.codes} == {200}
        text = httpx.get(f"{server.url}/metrics").text
        assert 'qrlora_queue_rows{model="bundle"} 0.0' in text
    assert server.end() == 0 and server.errors == []
