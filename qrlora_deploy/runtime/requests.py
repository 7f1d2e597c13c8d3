"""Requests from a JSON Lines file: text, and whose it is."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from qrlora_deploy.errors import FileFormatError, InputError


class Request(BaseModel):
    """One line.

    Attributes:
        text: the text, or the first one of a pair.
        pair: the second one.
        customer: whose; None is the base.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    text: str
    pair: str | None = None
    customer: str | None = None


def read_requests(path: Path) -> list[Request]:
    """Read a file with one JSON object a line; further keys are ignored.

    Raises:
        FileFormatError: a line is not such an object, or only some have a pair; the line is named.
        InputError: the file cannot be read or is empty.
    """
    try:
        # Not `splitlines`: JSON has some of its separators within texts.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    requests = [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise InputError(f"{path} holds no requests")
    if len({request.pair is None for request in requests}) > 1:
        raise FileFormatError(f"{path}: some requests have a pair and some have none")
    return requests


def _parse(path: Path, number: int, line: str) -> Request:
    try:
        return Request.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the line"
        raise FileFormatError(f"{path} line {number}: {place}: {first['msg']}") from error
