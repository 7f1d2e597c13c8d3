"""Running the command line: as a user does, in a process of its own, or in this one, which spares its imports."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from qrlora_deploy.cli import cli

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed under `--json`."""
        return json.loads(self.out)


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process of its own: this one's and `variables`, and it imports this checkout.

    What `PYTHONPATH` names already stays: another version of a library, where the tests run on one.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables


def run(*arguments: object, cwd: Path, prepare: Callable[[], None] | None = None) -> Ran:
    """Run `qrlora-deploy` with `arguments` in `cwd`; `prepare` runs in the new process first."""
    done = subprocess.run(
        [sys.executable, "-m", "qrlora_deploy.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        preexec_fn=prepare,
        timeout=240,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def run_here(*arguments: object, cwd: Path) -> Ran:
    """The same in this process."""
    with contextlib.chdir(cwd):
        done = CliRunner().invoke(cli, list(map(str, arguments)), prog_name="qrlora-deploy", catch_exceptions=False)
    return Ran(done.exit_code, done.stdout, done.stderr)


def succeed(arguments: Sequence[object], cwd: Path, how: Callable[..., Ran] = run) -> Any:
    """Run with `--json`, which must end well; returns what it printed."""
    ran = how(*arguments, "--json", cwd=cwd)
    assert ran.code == 0, ran.err
    assert "Traceback" not in ran.err
    return ran.json


def succeed_here(arguments: Sequence[object], cwd: Path) -> Any:
    """`succeed` in this process."""
    return succeed(arguments, cwd, run_here)
