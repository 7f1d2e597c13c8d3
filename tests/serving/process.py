"""`qrlora-deploy serve` in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.cli.running import environment

DEADLINE_S = 60.0


class Served:
    """A server's process.

    Attributes:
        url: where it listens.
        port: the same.
        ports: of its companions, by the option.
        errors: lines of its stderr.
    """

    def __init__(self, *arguments: object, cwd: Path) -> None:
        self.errors: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qrlora_deploy.cli", "serve", *map(str, arguments), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=environment(),
        )
        self._reader = threading.Thread(target=self._read_errors)
        self._reader.start()
        line = self.process.stdout.readline() if self.process.stdout else ""
        found = re.search(r" on (https?://[^\s;]+:(\d+))", line)
        if found is None:
            raise AssertionError(f"it does not serve: {line} {self.end()} {self.errors}")
        self.url, self.port = found[1], int(found[2])
        self.ports = {
            name: int(self.process.stdout.readline().split()[-1])
            for name in ("--grpc-port", "--admin-port")
            if name in arguments and self.process.stdout
        }

    def _read_errors(self) -> None:
        for line in self.process.stderr or ():
            self.errors.append(line)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """The code that it ends with."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code

    def end(self) -> int:
        """Make sure that it has ended; its code."""
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
            try:
                return self.wait()
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.wait()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()
