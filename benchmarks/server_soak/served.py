"""`qrlora-deploy serve` in processes of its own, and the address that clients look up as from a load balancer."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.export_speed import ROOT, variables_of
from benchmarks.server_soak.place import Place
from benchmarks.server_soak.watching import Watched, processes_of

OPTIONS = ("--threads", "1", "--port", "0", "--grpc-port", "0", "--drain-delay", "3", "--drain-seconds", "30")

END_S = 60.0


class Served:
    """A server that answers.

    Args:
        place: of the soak.
        processes: fronts; 0: all in one process.
        log: file that its stderr goes to.

    Attributes:
        watched: its processes by their ids.
    """

    def __init__(self, place: Place, processes: int, log: Path) -> None:
        command = [sys.executable, "-m", "qrlora_deploy.cli", "serve", "bundle", "--customers", "customers"]
        more = ("--processes", str(processes)) if processes else ()
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [*command, "--keys", "keys.json", *OPTIONS, *more],
                cwd=place.folder,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=variables_of(ROOT),
            )
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        found = re.search(r" on http://[^\s;]+:(\d+)", first)
        if found is None:
            raise SystemExit(f"the server does not start: {first} {log.read_text()[-2000:]}")
        self._ports = {"http": int(found[1]), "grpc": int(self._process.stdout.readline().split()[-1])}
        self.watched = {pid: Watched(role) for pid, role in processes_of(self._process.pid).items()}

    def is_addressed(self, place: Place) -> None:
        """From now on clients come here."""
        temporary = place.address.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._ports))
        temporary.replace(place.address)

    def look(self) -> None:
        """Take samples of all its processes."""
        for pid, watched in self.watched.items():
            watched.look(pid)

    def reload(self) -> None:
        """SIGHUP."""
        os.kill(self._process.pid, signal.SIGHUP)

    def end(self) -> int:
        """Drain it; the code that it ends with."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
