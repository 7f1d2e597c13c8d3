"""A server for a long time under everything at once; every answer is checked against the session's.

    python -m benchmarks.server_soak --minutes 30 --requests 1000000 -o benchmarks/results/server_soak.json

A server in one process and one of `--processes 2` run side by side, each with customers of its own who ask over HTTP
and gRPC while customers' files are swapped, keys are reloaded, clients are killed, slow and broken ones connect, and
in the first third of the time the server is rolled again and again: a new one takes over, the old one drains. The last
server stays, and its memory is watched. Exit code 1 says that an answer was lost or wrong, that a refusal cannot be
explained, or that a process grows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.measuring import environment
from benchmarks.export_speed import ROOT, variables_of
from benchmarks.server_soak.changing import Swaps, change_keys, lines_of
from benchmarks.server_soak.making import make
from benchmarks.server_soak.place import CUSTOMERS, TEXTS, VERSIONS, Place
from benchmarks.server_soak.served import Served
from benchmarks.server_soak.told import NEAR, STALE_S
from benchmarks.server_soak.watching import LEAST_MIN, MOST_KB_MIN
from qrlora_deploy.io.files import write_json

SETUPS = {"one process": 0, "two fronts and an engine": 2}
ROLLING = 1 / 3
"""Of the time, in which servers follow one another."""

SWAP_S, RELOAD_S, KILL_S, LOOK_S, TELL_S = 0.1, 7.0, 11.0, 2.0, 10.0
GRPC_SHARE = 0.1
FAULTS = ("wrong", "lost", "unexplained")


@dataclass(frozen=True)
class Times:
    """How long a soak lasts.

    Attributes:
        seconds: in all.
        roll_s: between two servers.
        requests: of all clients, at most.
    """

    seconds: float
    roll_s: float
    requests: int


class Soak:
    """One set-up.

    Args:
        place: with everything that is needed.
        name: of the set-up.
        processes: as of `serve`.
        times: how long.
    """

    def __init__(self, place: Place, name: str, processes: int, times: Times) -> None:
        self._place, self.name, self._processes, self._times = place, name, processes, times
        self._log = place.folder / "log.txt"
        self._done: Counter[str] = Counter()
        self._start_s = time.monotonic()
        self._thread = threading.Thread(target=self._run)
        self.codes: list[int] = []
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def is_over(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._soak()
        except BaseException as error:
            self.failure = error

    def _soak(self) -> None:
        self._server = self._new_server()
        self._start_s = time.monotonic()
        clients = self._clients()
        try:
            self._change_everything()
            for client in clients:
                client.wait()
        finally:
            for client in clients:
                client.kill()
            self.codes.append(self._server.end())

    def _new_server(self) -> Served:
        server = Served(self._place, self._processes, self._log)
        server.is_addressed(self._place)
        return server

    def _clients(self) -> list["subprocess.Popen[bytes]"]:
        seconds, rate = self._times.seconds, self._times.requests / self._times.seconds
        http = (1 - GRPC_SHARE) * rate / 2
        return [
            *(self._client("asking", f"--seed={seed}", f"--rate={http}", f"--seconds={seconds}") for seed in (1, 2)),
            self._client("asking_grpc", f"--rate={GRPC_SHARE * rate}", f"--seconds={seconds}"),
            self._client("breaking", f"--seconds={seconds}"),
        ]

    def _client(self, name: str, *words: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", f"benchmarks.server_soak.{name}", f"--place={self._place.folder}", *words]
        with (self._place.folder / "clients.txt").open("a") as errors:
            return subprocess.Popen(command, env=variables_of(ROOT), stderr=errors)

    def _change_everything(self) -> None:
        """Swaps, reloads, rolls and kills, each at its time, until the end."""
        swaps, victim = Swaps(self._place), None
        due = dict.fromkeys(("swap", "reload", "roll", "kill", "look"), time.monotonic())
        due["roll"] += self._times.roll_s
        while (passed_s := time.monotonic() - self._start_s) < self._times.seconds:
            what = min(due, key=lambda name: due[name])
            time.sleep(max(0.0, due[what] - time.monotonic()))
            if what == "swap":
                swaps.swap()
                due[what] += SWAP_S
            elif what == "reload":
                change_keys(self._place)
                self._server.reload()
                due[what] = time.monotonic() + RELOAD_S
            elif what == "roll":
                if passed_s < ROLLING * self._times.seconds:
                    self._roll()
                due[what] = time.monotonic() + self._times.roll_s
            elif what == "kill":
                victim = self._next_victim(victim)
                due[what] = time.monotonic() + KILL_S
            else:
                self._server.look()
                due[what] = time.monotonic() + LOOK_S
            self._done[what] += 1
        if victim is not None:
            victim.kill()
            victim.wait()

    def _roll(self) -> None:
        before, self._server = self._server, self._new_server()
        self.codes.append(before.end())

    def _next_victim(self, victim: "subprocess.Popen[bytes] | None") -> "subprocess.Popen[bytes]":
        """Kill a client while its requests are on their way, and start another."""
        if victim is not None:
            victim.kill()
            victim.wait()
        return self._client("asking", "--seed=9", "--rate=60", f"--seconds={self._times.seconds}")

    def counts(self) -> tuple[Counter[str], list[str], float]:
        """What all clients have counted so far, their first faults, and the oldest version that has answered."""
        counts: Counter[str] = Counter()
        notes: list[str] = []
        stale_s = 0.0
        for path in sorted((self._place.folder / "told").glob("*.json")):
            record = json.loads(path.read_text())
            counts.update(record["counts"])
            notes += record["notes"]
            stale_s = max(stale_s, record["stale_s"])
        return counts, notes, stale_s

    def line(self) -> str:
        """How far it is, for people."""
        counts, notes, _ = self.counts()
        memory = " ".join(f"{it.role} {it.samples[-1][1] / 1024:.1f}" for it in self._watched() if it.samples)
        faults = {name: sum(times for what, times in counts.items() if what.startswith(name)) for name in FAULTS}
        return (
            f"{self.name}: {time.monotonic() - self._start_s:.0f} s, {counts['answered']} answered, {faults}, "
            f"MB: {memory} {notes[:1] or ''}"
        )

    def _watched(self) -> Sequence[Any]:
        return list(self._server.watched.values()) if hasattr(self, "_server") else []

    def record(self) -> dict[str, Any]:
        """All of it."""
        if self.failure is not None:
            raise self.failure
        counts, notes, stale_s = self.counts()
        return {
            "processes": self._processes,
            "seconds": self._times.seconds,
            "answered": counts["answered"],
            "rows_checked": counts["rows"],
            "faults": {what: times for what, times in counts.items() if times and what.startswith(FAULTS)},
            "notes": notes,
            "counts": dict(sorted(counts.items())),
            "longest_after_replacement_s": stale_s,
            "swaps": self._done["swap"],
            "reloads": self._done["reload"],
            "killed_clients": self._done["kill"],
            "servers": len(self.codes),
            "exit_codes": self.codes,
            "standing": [it.record() for it in self._watched() if it.samples],
            "log": lines_of(self._log),
        }


def faults_of(record: dict[str, Any]) -> list[str]:
    """What is wrong with a set-up, in words."""
    found = [f"{what}: {times}" for what, times in record["faults"].items()]
    found += [f"a server ended with {code}" for code in record["exit_codes"] if code]
    for process in record["standing"]:
        if process["minutes_fitted"] > LEAST_MIN and process["kb_per_min"] > MOST_KB_MIN:
            found.append(f"{process['role']} grows by {process['kb_per_min']:.0f} kB/min")
    return found


def soak(folder: Path, times: Times, copies: int) -> dict[str, Any]:
    """All set-ups side by side, each so many times."""
    soaks = []
    for copy in range(copies):
        for name, processes in SETUPS.items():
            home = folder / f"setup-{processes}-{copy}"
            (home / "told").mkdir(parents=True)
            soaks.append(Soak(make(home), f"{name}, {copy + 1}" if copies > 1 else name, processes, times))
    for each in soaks:
        each.start()
    while not all(each.is_over() for each in soaks):
        time.sleep(TELL_S)
        for each in soaks:
            print(each.line(), flush=True)
    return {each.name: each.record() for each in soaks}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--requests", type=int, default=1_000_000, help="of all set-ups together, spread over the time")
    parser.add_argument("--copies", type=int, default=1, help="of each set-up, where there are cores for more")
    parser.add_argument("--quick", action="store_true", help="half a minute and 15,000 requests")
    parser.add_argument("-o", "--output", type=Path, help="record; without it nothing is written")
    options = parser.parse_args()
    seconds, requests = (30.0, 15_000) if options.quick else (60 * options.minutes, options.requests)
    times = Times(seconds, max(6.0, seconds / 30), -(-requests // (len(SETUPS) * options.copies)))
    with tempfile.TemporaryDirectory() as name:
        found = soak(Path(name), times, options.copies)
    faults = {name: faults_of(record) for name, record in found.items()}
    setting = {"customers": CUSTOMERS, "versions": VERSIONS, "texts": TEXTS, "near": NEAR, "stale_s": STALE_S}
    answered = sum(record["answered"] for record in found.values())
    record = {"answered": answered, "faults": faults, "most_kb_per_min": MOST_KB_MIN, "setting": setting}
    record |= {"setups": found, "environment": environment("cpu")}
    print(json.dumps(record, indent=1))
    if options.output is not None:
        write_json(options.output, record)
    if any(faults.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
