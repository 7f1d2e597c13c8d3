"""Requests for answers from a JSON Lines file, and the file of their answers, which an interrupted run goes on with."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pydantic import ConfigDict, Field

from qrlora_deploy.errors import FileFormatError, InputError, argument, fields_for_arguments
from qrlora_deploy.io.files import atomic_file, writing
from qrlora_deploy.io.outputs import check_replaceable
from qrlora_deploy.io.reading import parse_json
from qrlora_deploy.io.temporary import open_locked
from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationRequest
from qrlora_deploy.runtime.generation.sampling import Sampling
from qrlora_deploy.runtime.prediction.requests import MAX_LINE_BYTES, OwnedLine, parse_line

PARTIAL = ".partial"
"""Behind the name of a file of answers that is not whole."""

HEADER = "requests_digest"
"""The one entry of its first line."""

MAX_HEADER_BYTES = 4096


class _RequestLine(OwnedLine):
    """One line; what it leaves out is as the caller says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str | None = None
    messages: list[dict[str, str]] | None = Field(default=None, min_length=1)
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    timeout_s: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logprobs: int | None = None


FIELDS = frozenset(_RequestLine.model_fields)
"""Of a line; messages name them as JSON does."""

Asked = GenerationRequest | FileFormatError
"""A request, or why a line is none."""


def read_generation_requests(path: Path, defaults: GenerationRequest) -> list[Asked]:
    """Read a file with one JSON object a line: "prompt" or "messages", "customer", and what `GenerationRequest` and
    `Sampling` have; "stop" is a text or a list of them.

    Args:
        path: the file.
        defaults: for what a line leaves out.

    Returns:
        For each line its request, or the error that names the line and what is wrong with it: other keys too, since a
        misspelt one would be answered as if it were not there.

    Raises:
        InputError: the file cannot be read or is empty.
    """
    try:
        with path.open("rb") as file, fields_for_arguments(FIELDS):
            found = [_asked(path, number, line, defaults) for number, line in _lines(file) if line.strip()]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not found:
        raise InputError(f"{path} holds no requests")
    return found


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers; of one that is too long no more than that can be seen."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        yield number, line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            line = line if not rest.endswith(b"\n") else rest


def _asked(path: Path, number: int, line: bytes, defaults: GenerationRequest) -> Asked:
    try:
        return _request(path, number, line, defaults)
    except FileFormatError as error:
        return error


def _request(path: Path, number: int, line: bytes, defaults: GenerationRequest) -> GenerationRequest:
    place = f"{path} line {number}"
    found = parse_line(_RequestLine, path, number, _text(place, number, line))
    prompt = found.prompt if found.messages is None else found.messages
    if prompt is None or (found.prompt is not None and found.messages is not None):
        raise FileFormatError(f'{place}: a line needs either "prompt" or "messages"')
    given = {name: value for name, value in found.model_dump().items() if value is not None}
    stop = given.get("stop", defaults.stop)
    try:
        sampling = Sampling(**{name: given.get(name, value) for name, value in vars(defaults.sampling).items()})
        return GenerationRequest(
            prompt,
            found.customer or defaults.customer,
            sampling,
            given.get("max_tokens", defaults.max_tokens),
            [stop] if isinstance(stop, str) else stop,
            given.get("timeout_s", defaults.timeout_s),
        )
    except InputError as error:
        raise FileFormatError(f"{place}: {error}") from error


def _text(place: str, number: int, line: bytes) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise FileFormatError(f"{place} is longer than {MAX_LINE_BYTES // 2**20} MiB; shorten the text")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{place} is not UTF-8 text: {error.reason} at its byte {error.start}") from error


def refusal(error: FileFormatError, base_digest: str) -> GenerationAnswer:
    """The answer to a line that is no request."""
    return GenerationAnswer("", (), "error", None, base_digest, error=error)


def answer_record(answer: GenerationAnswer) -> dict[str, Any]:
    """An answer as JSON has it."""
    record: dict[str, Any] = {
        "customer": answer.customer,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "stop": answer.stop,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "customer_digest": answer.customer_digest or None,
        "base_digest": answer.base_digest,
        "seed": answer.seed,
    }
    if answer.logprobs:
        record["logprobs"] = [
            {"token": choice.token, "logprob": choice.logprob, "best": [list(pair) for pair in choice.best]}
            for choice in answer.logprobs
        ]
    return record | ({} if answer.error is None else {"error": str(answer.error)})


class AnswerFile:
    """Answers, a line each, in the order of the requests. The file takes its name when it is whole.

    Until then it is `<name>.partial`, whose first line says what was asked, locked as long as it is written.

    Args:
        path: the file.
        requests: what is asked, as `read_generation_requests` gives it.
        model: what decides the answers besides, such as the bundle's digests.
        resume: go on with what an interrupted run has written; without it that is refused, and a part of other requests
            is replaced.

    Attributes:
        done: answers that are written.

    Raises:
        InputError: there is a part of other requests to go on with, or of these and nobody asked for it, or another
            process writes it, or a file that is there holds something else.
    """

    def __init__(self, path: Path, requests: Sequence[Asked], model: Mapping[str, Any], resume: bool = False) -> None:
        check_replaceable(path, "file of answers", _is_answers)
        self.path, self.partial = path, path.with_name(path.name + PARTIAL)
        check_replaceable(self.partial, "part of a file of answers", _is_part)
        self._header = json.dumps({HEADER: _digest(requests, model)}).encode() + b"\n"
        self._waiting: dict[int, dict[str, Any]] = {}
        with writing(self.partial):
            file = open_locked(self.partial)
        if file is None:
            raise InputError(f"another process is writing {self.path}: it holds {self.partial}")
        self._file = file
        try:
            with writing(self.partial):
                self.done = self._go_on(len(requests), resume)
        except BaseException:
            self._file.close()
            raise

    def _go_on(self, most: int, resume: bool) -> int:
        """The answers that are there; the part holds these and the header alone afterwards."""
        self._file.seek(0)
        header = self._file.readline(MAX_HEADER_BYTES)
        # One that was cut within its header holds no answer.
        ours, empty = header == self._header, not header.endswith(b"\n")
        if resume and not (ours or empty):
            raise InputError(
                f"{self.partial} answers other requests, or by another model; remove it, or leave out "
                f"{argument('resume')}"
            )
        done = self._cut_to_whole_lines(most) if ours else 0
        if done and not resume:
            raise InputError(
                f"{self.partial} holds {done} answers of an interrupted run of these requests; go on by "
                f"{argument('resume', True)}, or remove it to start again"
            )
        if not done:
            self._file.truncate(0)
            self._file.write(self._header)
            self._file.flush()
        return done

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Take the answer to the request `number`; it is written when all before it are."""
        self._waiting[number] = record
        with writing(self.partial):
            while self.done in self._waiting:
                line = json.dumps(self._waiting.pop(self.done), ensure_ascii=False)
                self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
                self.done += 1
            self._file.flush()

    def finish(self) -> None:
        """Give the file its name; every answer is there."""
        self._file.seek(0)
        self._file.readline()
        with atomic_file(self.path) as whole, whole.open("wb") as target:
            shutil.copyfileobj(self._file, target)
        self.partial.unlink()
        self._file.close()

    def close(self) -> None:
        """Stop; the part stays."""
        self._file.close()

    def records(self) -> Iterator[dict[str, Any]]:
        """The answers that are written, of the part."""
        with self.partial.open("rb") as file:
            file.readline()
            for line in file:
                yield parse_json(line.decode(), f"{self.partial} is damaged")

    def _cut_to_whole_lines(self, most: int) -> int:
        """Lines that are whole; a line that was cut off by the interruption is removed."""
        lines, end = 0, self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n") or lines == most:
                break
            lines, end = lines + 1, end + len(line)
        self._file.truncate(end)
        return lines


def _is_answers(path: Path) -> bool:
    with path.open("rb") as file:
        return b'"finish_reason"' in file.readline(MAX_LINE_BYTES)


def _is_part(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(MAX_HEADER_BYTES)
    expected = f'{{"{HEADER}": '.encode()
    return start.startswith(expected[: len(start)])


def _digest(requests: Sequence[Asked], model: Mapping[str, Any]) -> str:
    """SHA-256 over what is asked and what answers."""
    found = hashlib.sha256(json.dumps(dict(model), sort_keys=True).encode())
    for request in requests:
        found.update(ascii(request).encode())
    return found.hexdigest()
