"""Reading what comes from outside: text and JSON of bounded size and depth, and what the system refuses."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qrlora_deploy.errors import FileFormatError, InputError, library_errors

MAX_TEXT_BYTES = 16 * 2**20

MAX_NESTING = 64
"""Depth of a JSON value from a file; no file of this project comes near it."""

READ_BYTES = 2**16

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character beyond the first 65,536, as JSON writes it; two make one."""


def is_file(path: Path) -> bool:
    """Whether `path` is a file; a name that the system does not take, such as one of 5,000 characters, is none."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system has against reading `path` into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or _refusal(path) or error}") from error


def _refusal(path: Path) -> str:
    """What the system says when `path` is opened: safetensors says of every reason that there is no such file."""
    try:
        with path.open("rb"):
            return ""
    except OSError as error:
        return error.strerror or ""


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a file in UTF-8.

    Raises:
        InputError: it cannot be read.
        FileFormatError: it has more than `limit` bytes, or is no text.
    """
    content = bytearray()
    with readable(path), path.open("rb") as file:
        # In pieces: a pipe has no size, and a file may be without end.
        while piece := file.read(READ_BYTES):
            content += piece
            if len(content) > limit:
                raise FileFormatError(f"{path} is larger than {limit} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def parse_json(text: str, what: str, unique: bool = False) -> Any:
    """A JSON value that whoever walks, prints or stores it can: not too deep, and of whole characters.

    Args:
        text: JSON.
        what: file, and what is wrong where it is none, such as "config.json is not JSON".
        unique: refuse an object with a name twice.

    Raises:
        FileFormatError: it is none, is nested deeper than `MAX_NESTING`, or a text in it holds half
            of a surrogate pair.
    """
    with library_errors(what):
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    if holds_surrogate(text):
        with library_errors(f"{what}: a text in it holds half of a character"):
            json.dumps(value, ensure_ascii=False).encode()
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return value
    level = [value]
    for _ in range(MAX_NESTING):
        level = [item for value in level for item in _items(value)]
        if not level:
            return value
    raise FileFormatError(f"{what}: it is nested deeper than {MAX_NESTING} levels")


def holds_surrogate(text: str) -> bool:
    """Whether JSON may hold half of a character, so that it is to be looked at closely."""
    # Most texts have no such escapes at all, which is seen in a tenth of the time.
    return "\\u" in text and SURROGATE.search(text) is not None


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`.

    Raises:
        InputError: it has a name twice; Python would keep the last one, other programs the first.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise InputError(f"has the name {twice!r} twice")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return unique_names(pairs)
    except InputError as error:
        raise ValueError(f"an object in it {error}") from error


def _items(value: Any) -> list[Any]:
    """What is in an object or a list and may hold something itself."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in inner if isinstance(item, dict | list)]
