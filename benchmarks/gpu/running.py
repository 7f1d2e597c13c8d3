"""Running one part as a process of its own, and the ledger of what was run."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.parts import Part, failed_checks
from qrlora_deploy.errors import InputError
from qrlora_deploy.io.files import write_json

ROOT = Path(__file__).parents[2]
LEDGER, LOGS, UNFINISHED = "parts.json", "logs", "unfinished"

CLOSING_S = 10.0
"""For a log's last lines, once the process has ended and its children were told to."""


@dataclass(frozen=True)
class Outcome:
    """How a run of a part ended.

    Attributes:
        settings: of the part.
        seconds: that it took.
        date: of its end.
        reason: why it failed; "" where its record is there and all checks passed.
    """

    settings: list[str]
    seconds: float
    date: str
    reason: str


class Ledger:
    """What was run into a folder, kept in `parts.json`.

    Args:
        folder: of the records; it exists.

    Raises:
        InputError: `parts.json` is there and is none of these.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / LEDGER
        try:
            self._outcomes = (
                {name: Outcome(**one) for name, one in json.loads(path.read_bytes()).items()} if path.is_file() else {}
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no list of parts of this benchmark; give another --output") from error

    def outcome(self, part: Part) -> Outcome | None:
        """How the part ended when it last ran with these settings, if it did."""
        found = self._outcomes.get(part.name)
        return found if found is not None and found.settings == part.settings else None

    def done(self, part: Part) -> bool:
        """Whether its files are there, made with these settings, and its checks passed."""
        found = self.outcome(part)
        return found is not None and not found.reason and all((self.folder / name).is_file() for name in part.files)

    def note(self, part: Part, outcome: Outcome) -> None:
        """Write down how a run ended."""
        self._outcomes[part.name] = outcome
        write_json(self.folder / LEDGER, {name: asdict(one) for name, one in self._outcomes.items()})

    def records(self, part: Part) -> dict[str, Any]:
        """The part's records by file name, as far as they were made with its settings.

        Raises:
            InputError: one of them is not JSON.
        """
        if self.outcome(part) is None:
            return {}
        return {name: _read(self.folder / name) for name in part.records if (self.folder / name).is_file()}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON; remove it, and its part runs again") from error


def run_part(part: Part, folder: Path, stop_after_s: float | None) -> Outcome:
    """Run a part, print what it says, keep it as a log, and put its files into `folder` when it has succeeded.

    What a part that failed has written stays in `unfinished/`. Its older files are removed first, so that no table
    shows them beside the new failure.

    Args:
        stop_after_s: seconds after which it is killed; None: never.
    """
    start = time.perf_counter()
    place = folder / UNFINISHED / part.name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in part.files:
        (folder / name).unlink(missing_ok=True)
    (folder / LOGS).mkdir(exist_ok=True)
    reason = _run(part, place, folder / LOGS / f"{part.name}.log", stop_after_s)
    missing = [name for name in part.files if not (place / name).is_file()]
    if not reason and missing:
        reason = f"ended without writing {', '.join(missing)}"
    if not reason:
        for name in part.files:
            (place / name).replace(folder / name)
        shutil.rmtree(place)
        with contextlib.suppress(OSError):
            # Where nothing else is unfinished.
            place.parent.rmdir()
        reason = "; ".join(check for name in part.records for check in failed_checks(part, _read(folder / name)))
        reason = f"a check failed: {reason}" if reason else ""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Outcome(part.settings, round(time.perf_counter() - start, 1), date, reason)


def _run(part: Part, place: Path, log: Path, stop_after_s: float | None) -> str:
    """Why it failed, or ""."""
    with _process(part.command(place)) as process, log.open("w", encoding="utf-8") as file:
        seen: list[str] = []
        reader = threading.Thread(target=_copy, args=(process.stdout, file, part.name, seen), daemon=True)
        reader.start()
        try:
            code = process.wait(stop_after_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
            reader.join(CLOSING_S)
    if code is None:
        return f"stopped after {stop_after_s:.0f} s, when the budget was spent"
    if code:
        last = next((line for line in reversed(seen) if line.strip()), "it said nothing")
        return f"exit code {code}: {last.strip()[:300]}"
    return ""


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, which is killed with all its children when the block ends."""
    # Progress bars would fill the log; lines should come as they are printed.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _kill(process)
        process.wait()


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _copy(source: IO[str], log: IO[str], name: str, seen: list[str]) -> None:
    for line in source:
        log.write(line)
        log.flush()
        print(f"[{name}] {line.rstrip()}", flush=True)
        seen[:] = [*seen[-20:], line]
