"""What the processes of a server are told when they start."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from qrlora_deploy.serving.assembly import AssemblyOptions

ENGINE, FRONT = "engine", "front"


@dataclass(frozen=True)
class ChildOptions:
    """What a process is, and where it finds the others.

    Attributes:
        role: "engine" or "front".
        number: among those of its role.
        folder: of the engines' sockets, which the owner alone may enter.
        server: what the server is made of. Its ports are never 0 here.
        devices: one for each engine.
        log_json: logs are lines of JSON.
    """

    role: str
    number: int
    folder: Path
    server: AssemblyOptions
    devices: Sequence[str]
    log_json: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.role} {self.number}"

    @property
    def device(self) -> str:
        """Of an engine."""
        return self.devices[self.number]

    def socket_of(self, number: int) -> Path:
        """Where an engine listens for fronts."""
        return self.folder / f"engine-{number}.sock"

    def as_text(self) -> str:
        """JSON, for the command line of a process."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def of_text(cls, text: str) -> "ChildOptions":
        """From `as_text`."""
        return _ADAPTER.validate_json(text)

    def engine_run(self) -> AssemblyOptions:
        """What the server is made of, on the device of this engine."""
        return replace(self.server, run=replace(self.server.run, provider=self.device))


_ADAPTER = TypeAdapter(ChildOptions)


def command(options: ChildOptions, descriptor: int) -> list[str]:
    """The command line of a process whose end of the connection to the supervisor is `descriptor`."""
    module = "qrlora_deploy.serving.processes.child"
    # -P: a module in the folder where the server was started is none of its own.
    return [sys.executable, "-P", "-m", module, str(descriptor), options.as_text()]


def environment() -> dict[str, str]:
    """Of a process: it finds the modules that this one found."""
    paths = [str(Path(path).resolve()) for path in sys.path if path] + [str(Path.cwd())] * ("" in sys.path)
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
