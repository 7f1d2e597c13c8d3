"""Requests from a JSON Lines file: text, and whose it is."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qrlora_deploy.errors import FileFormatError, InputError, library_errors
from qrlora_deploy.formats.customer_files import check_customer_id
from qrlora_deploy.io.reading import unique_names

MAX_LINE_BYTES = 64 * 2**20
"""Far more than any model reads of a text."""


class OwnedLine(BaseModel):
    """What every line may say.

    Attributes:
        customer: whose; None is the base.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    customer: str | None = None


Line = TypeVar("Line", bound=OwnedLine)


class Request(OwnedLine):
    """One line.

    Attributes:
        text: the text, or the first one of a pair.
        pair: the second one.
    """

    text: str
    pair: str | None = None


def read_requests(path: Path) -> list[Request]:
    """Read a file with one JSON object a line; further keys are ignored.

    Raises:
        FileFormatError: a line is not such an object, has a name twice or a customer that can be none, or only
            some have a pair; the line is named.
        InputError: the file cannot be read or is empty.
    """
    try:
        with path.open("rb") as file:
            numbered = [(number, line) for number, line in lines_of(file, path) if line.strip()]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not numbered:
        raise InputError(f"{path} holds no requests")
    requests = [parse_line(Request, path, number, line) for number, line in numbered]
    if len({request.pair is None for request in requests}) > 1:
        raise FileFormatError(f"{path}: some requests have a pair and some have none")
    return requests


def lines_of(file: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """The lines with their numbers; one at a time, so that no line takes more memory than it may have bytes."""
    number, start = 0, 0
    # Not `splitlines`: JSON has some of its separators within texts.
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise FileFormatError(
                f"{path} line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB; shorten the text"
            )
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            place = start + error.start
            raise FileFormatError(f"{path} is not UTF-8 text: {error.reason} at byte {place}") from error
        start += len(line)


def parse_line(kind: type[Line], path: Path, number: int, line: str) -> Line:
    """One line as a record of this kind.

    Raises:
        FileFormatError: it is none, has a name twice or a customer that can be none.
    """
    place = f"{path} line {number}"
    request = _validated(kind, place, line)
    try:
        with library_errors("it is not JSON"):
            # Pydantic takes the last of two. Numbers are not read: those of thousands of digits are none of ours.
            json.loads(line, object_pairs_hook=unique_names, parse_int=str, parse_float=str)
        if request.customer is not None:
            check_customer_id(request.customer)
    except InputError as error:
        raise FileFormatError(f"{place}: {error}") from error
    return request


def _validated(kind: type[Line], place: str, line: str) -> Line:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the line"
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, kind.model_fields, 1)
            known = f'did you mean "{near[0]}"?' if near else f"a line may have {', '.join(kind.model_fields)}"
            raise FileFormatError(f'{place}: there is no "{field}"; {known}') from error
        raise FileFormatError(f"{place}: {field}: {first['msg']}") from error
