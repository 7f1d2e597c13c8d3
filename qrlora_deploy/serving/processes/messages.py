"""What fronts and engines tell each other: JSON, and behind it numbers as they lie in memory. Nothing is executed."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
import orjson

from qrlora_deploy.errors import (
    FileFormatError,
    InputError,
    MalformedInputError,
    MismatchError,
    QrloraError,
    UnknownCustomerError,
)
from qrlora_deploy.runtime.customers.objects.store import ObjectStoreStats
from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.engine.rows import Row, RowAnswer, Run
from qrlora_deploy.serving.generation.counting import WriterStats
from qrlora_deploy.serving.processes.links import BrokenFrameError, record_of
from qrlora_deploy.serving.refusals import (
    DeadlineError,
    DrainingError,
    OverloadedError,
    QuotaError,
    TooLargeError,
    retry_after_of,
)

LENGTH = struct.Struct("<I")

ERRORS: dict[str, type[QrloraError]] = {
    error.kind: error
    for error in (
        InputError,
        FileFormatError,
        MalformedInputError,
        UnknownCustomerError,
        MismatchError,
        OverloadedError,
        QuotaError,
        DrainingError,
        DeadlineError,
        TooLargeError,
    )
}
"""What an engine refuses by; any other error is a `QrloraError` on the other side."""


class Kind(IntEnum):
    """Of frames between a front and an engine. The number of a frame is the request's."""

    ADMIT = 1
    RELEASE = 2
    SUBMIT = 3
    CANCEL = 4
    GRANTED = 5
    REFUSED = 6
    ANSWERED = 7
    STATS = 8
    WRITE = 9
    EVENTS = 10
    CHECK = 11
    CHECKED = 12


def with_numbers(record: Any, *arrays: np.ndarray) -> tuple[bytes, ...]:
    """A payload: the length of its JSON, that, and arrays."""
    head = orjson.dumps(record)
    return LENGTH.pack(len(head)), head, *(array.tobytes() for array in arrays)


def split_numbers(payload: bytearray, dtype: type[np.generic]) -> tuple[Any, np.ndarray]:
    """The JSON of a payload, and its numbers as an array of one dimension that may be written to.

    Raises:
        BrokenFrameError: it is no such payload.
    """
    if len(payload) < LENGTH.size:
        raise BrokenFrameError("a frame without a head")
    end = LENGTH.size + LENGTH.unpack_from(payload)[0]
    size = np.dtype(dtype).itemsize
    if end > len(payload) or (len(payload) - end) % size:
        raise BrokenFrameError("a frame whose head is longer than the frame, or whose numbers are none")
    return record_of(payload[LENGTH.size : end]), np.frombuffer(payload[end:], dtype)


def pack_rows(rows: Sequence[Row]) -> tuple[bytes, ...]:
    """The payload of rows. Whose they are, the engine knows since `ADMIT`; their words stay in the front."""
    names = list(rows[0].inputs)
    arrays = [np.ascontiguousarray(row.inputs[name], dtype=np.int64) for name in names for row in rows]
    return with_numbers([names, [row.length for row in rows]], *arrays)


def unpack_rows(payload: bytearray, customers: Sequence[str | None]) -> list[Row]:
    """The rows of a payload, one for each customer.

    Raises:
        BrokenFrameError: they are no rows, or another number.
    """
    head, numbers = split_numbers(payload, np.int64)
    try:
        names, lengths = head
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        right = len(lengths) == len(customers) and min(lengths) > 0 and len(names) * ends[-1] == len(numbers)
    except (TypeError, ValueError, IndexError) as error:
        raise BrokenFrameError("a frame of rows with no lengths") from error
    if not right or not all(isinstance(name, str) for name in names):
        raise BrokenFrameError("a frame of rows whose lengths are not those of its numbers")
    arrays = numbers.reshape(len(names), ends[-1])
    begins = [0, *ends[:-1]]
    return [
        Row({name: arrays[i, begin:end] for i, name in enumerate(names)}, customer)
        for begin, end, customer in zip(begins, ends, customers, strict=True)
    ]


def pack_answers(answers: Sequence[RowAnswer]) -> tuple[bytes, ...]:
    """The payload of answers; what many rows have in common is in it once."""
    kinds: dict[tuple[tuple[str, ...], tuple[float, ...]], int] = {}
    runs: dict[Run | None, int] = {}
    rows = [
        (
            kinds.setdefault((answer.labels, answer.thresholds), len(kinds)),
            runs.setdefault(answer.run, len(runs)),
            answer.digest,
            answer.logits.shape,
        )
        for answer in answers
    ]
    return with_numbers(
        [list(kinds), list(runs), rows], *(np.asarray(answer.logits, dtype=np.float32) for answer in answers)
    )


def unpack_answers(payload: bytearray, rows: Sequence[Row]) -> list[RowAnswer]:
    """The answers of a payload to `rows`.

    Raises:
        BrokenFrameError: they are none, or another number.
    """
    head, numbers = split_numbers(payload, np.float32)
    try:
        answers = list(_answers(head, numbers, rows))
    except (TypeError, ValueError, IndexError) as error:
        raise BrokenFrameError("a frame of answers that are none") from error
    if len(answers) != len(rows):
        raise BrokenFrameError(f"{len(answers)} answers to {len(rows)} rows")
    return answers


def _answers(head: Any, numbers: np.ndarray, rows: Sequence[Row]) -> Iterator[RowAnswer]:
    begin = 0
    kinds = [(tuple(labels), tuple(thresholds)) for labels, thresholds in head[0]]
    runs = [None if run is None else Run(**run) for run in head[1]]
    for row, (kind, run, digest, shape) in zip(rows, head[2], strict=True):
        end = begin + int(np.prod(shape))
        labels, thresholds = kinds[kind]
        yield RowAnswer(numbers[begin:end].reshape(shape), labels, digest, thresholds, row.words, runs[run])
        begin = end


def pack_error(error: QrloraError) -> bytes:
    """The payload of an error: its kind, its line, and when it is worth another try."""
    return orjson.dumps([error.kind, str(error), retry_after_of(error)])


def unpack_error(payload: bytearray) -> QrloraError:
    """The error of a payload, of the class that it had."""
    kind, message, retry_after_s = record_of(payload)
    found = ERRORS.get(kind, QrloraError)
    if issubclass(found, OverloadedError) and retry_after_s is not None:
        return found(message, retry_after_s)
    return found(message)


def unpack_stats(record: Mapping[str, Any]) -> EngineStats:
    """Counters as JSON has them."""
    known = {field.name for field in fields(EngineStats)}
    return EngineStats(**{name: _frozen(value) for name, value in record.items() if name in known})


@dataclass(frozen=True)
class EngineState:
    """What the process of an engine tells of itself.

    Attributes:
        engines: counters, by model.
        stores: how the object stores of the customers are doing, by model.
        writers: counters of those that write text, by model.
    """

    engines: Mapping[str, EngineStats]
    stores: Mapping[str, ObjectStoreStats]
    writers: Mapping[str, WriterStats]

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "EngineState":
        """From JSON.

        Raises:
            BrokenFrameError: it is no such state.
        """
        try:
            engines = {name: unpack_stats(stats) for name, stats in record["engines"].items()}
            stores = {name: ObjectStoreStats(**stats) for name, stats in record["stores"].items()}
            return cls(engines, stores, {name: WriterStats.of_record(it) for name, it in record["writers"].items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise BrokenFrameError("a frame of an engine's state that is none") from error


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
