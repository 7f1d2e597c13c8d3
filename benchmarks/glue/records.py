"""The record of a benchmark: one JSON line a run, appended by several processes, read after any crash."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qrlora_deploy.errors import InputError
from qrlora_deploy.io.files import atomic_file

Record = dict[str, Any]


def append_record(path: Path, record: Record) -> None:
    """Append one line and flush it to the disk before returning.

    A line that a killed process left half is closed first, so that it spoils no other.
    """
    line = json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[Record]:
    """All whole lines; a line that was cut is a run that was not finished.

    Raises:
        InputError: a line is JSON but no record of a run.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or "key" not in record:
            raise InputError(f"{path}: line {number} is no record of a run; give another --output")
        records.append(record)
    return records


def check_settings(path: Path, settings_of: Callable[[Record], Record]) -> None:
    """Make sure that the runs that are there were made as they would be now.

    Args:
        path: the record.
        settings_of: the settings that a recorded run would have now.

    Raises:
        InputError: naming those that differ.
    """
    for record in read_records(path):
        before, now = record.get("settings", {}), settings_of(record)
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            raise InputError(
                f"{path} holds runs with other settings ({', '.join(changed)}); use the same, another --output, or "
                "move these runs to another file by --set-aside FILE"
            )


def set_aside(path: Path, other: Path, is_current: Callable[[Record], bool]) -> int:
    """Move the runs that are not current from `path` to the end of `other`.

    Nothing is lost where this is cut off: a line may be in both files then, and is moved again.

    Returns:
        How many were moved.
    """
    records = read_records(path)
    old = [record for record in records if not is_current(record)]
    for record in old:
        append_record(other, record)
    if old:
        kept = [record for record in records if is_current(record)]
        with atomic_file(path) as temporary:
            temporary.write_text(
                "".join(f"{json.dumps(record, sort_keys=True)}\n" for record in kept), encoding="utf-8"
            )
    return len(old)


def known_seconds(folder: Path) -> dict[tuple[str, ...], float]:
    """The longest time of each model, task, start and method in all records of a folder, those set aside included."""
    found: dict[tuple[str, ...], float] = {}
    for path in sorted(folder.glob("runs*.jsonl")):
        for record in read_records(path):
            if "seconds" in record:
                kind = (record["model"], record["task"], record["start"], record["method"])
                found[kind] = max(found.get(kind, 0.0), record["seconds"])
    return found


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the run to itself; the claim ends with the block or with the process."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
