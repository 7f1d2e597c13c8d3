"""The record of a benchmark: one JSON line a run, appended by several processes, read after any crash."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qrlora_deploy.errors import InputError

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


def check_settings(path: Path, settings: Record) -> None:
    """Make sure that the runs that are there were made with the same settings.

    Raises:
        InputError: naming those that differ.
    """
    for record in read_records(path):
        before = record.get("settings", {})
        changed = sorted(n for n in before.keys() | settings.keys() if before.get(n) != settings.get(n))
        if changed:
            raise InputError(
                f"{path} holds runs with other settings ({', '.join(changed)}); use the same, or another --output"
            )


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
