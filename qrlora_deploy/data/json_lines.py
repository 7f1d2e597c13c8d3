"""JSON lines: one object a line, with a bound on the length of a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrlora_deploy.errors import InputError, library_errors
from qrlora_deploy.io.reading import unique_names

MAX_LINE_BYTES = 64 * 2**20
"""A line without an end would be read into memory whole, however long the file is."""


def read_objects(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The objects of a file in UTF-8, and what is wrong with the first line that is none; empty where nothing is.

    Not by pyarrow.json, which turns a text that looks like a date into a timestamp.

    Raises:
        InputError: a line is too long.
    """
    rows: list[dict[str, Any]] = []
    fault = ""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_parse(line))
        except InputError as error:
            fault = fault or f"{path}: line {number} {error}"
    return rows, fault


def _lines(path: Path) -> Iterator[bytes]:
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{path}: line {number + 1} is longer than {MAX_LINE_BYTES // 2**20} MB")
            # A carriage return alone ends a line too; within a JSON text there is none.
            for part in (line if number else line.removeprefix(b"\xef\xbb\xbf")).splitlines() or [b""]:
                number += 1
                yield part


def _parse(line: bytes) -> dict[str, Any]:
    with library_errors("is not UTF-8", InputError):
        text = line.decode()
    with library_errors("is not JSON", InputError):
        try:
            row = json.loads(text, object_pairs_hook=unique_names)
        except json.JSONDecodeError as error:
            # Its own message says "line 1", as if this line were the file.
            raise InputError(f"is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise InputError("is not a JSON object; one object a line is read")
    return row
