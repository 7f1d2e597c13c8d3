"""What fronts and engines tell each other about answers of text, in JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import orjson

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationEvent, GenerationRequest
from qrlora_deploy.runtime.generation.sampling import Choice, Sampling
from qrlora_deploy.serving.processes.links import BrokenFrameError, record_of
from qrlora_deploy.serving.processes.messages import pack_error, unpack_error


def pack_requests(requests: Sequence[GenerationRequest], every: bool) -> bytes:
    """The payload of requests. Whose they are, the engine knows since `ADMIT`."""
    records = [
        [list(it.prompt), asdict(it.sampling), it.max_tokens, list(it.stop), it.timeout_s, it.ignore_end]
        for it in requests
    ]
    return orjson.dumps([every, records])


def unpack_requests(payload: bytearray, customers: Sequence[str | None]) -> tuple[list[GenerationRequest], bool]:
    """The requests of a payload, one for each customer, and whether every event is wanted.

    Raises:
        BrokenFrameError: they are none, or another number.
    """
    try:
        every, records = record_of(payload)
        requests = [
            GenerationRequest(prompt, customer, Sampling(**sampling), *others)
            for (prompt, sampling, *others), customer in zip(records, customers, strict=True)
        ]
    except (TypeError, ValueError, InputError) as error:
        raise BrokenFrameError("a frame of requests that are none") from error
    return requests, bool(every)


def pack_events(events: Sequence[GenerationEvent]) -> bytes:
    """The payload of what happened to the answers of one request over the network."""
    return orjson.dumps(
        [[it.number, it.text, _choices(it.choices), it.shown, it.answer and _answer(it.answer)] for it in events]
    )


def unpack_events(payload: bytearray) -> list[GenerationEvent]:
    """The events of a payload.

    Raises:
        BrokenFrameError: they are none.
    """
    try:
        return list(_events(record_of(payload)))
    except (TypeError, ValueError, KeyError) as error:
        raise BrokenFrameError("a frame of events that are none") from error


def _events(records: Any) -> Iterator[GenerationEvent]:
    for number, text, choices, shown, answer in records:
        told = None if answer is None else _told(answer)
        yield GenerationEvent(number, text, _chosen(choices), told, shown)


def _choices(choices: Sequence[Choice]) -> list[Any]:
    return [[it.token, it.logprob, it.best] for it in choices]


def _chosen(records: Any) -> tuple[Choice, ...]:
    return tuple(Choice(token, logprob, tuple((one, log) for one, log in best)) for token, logprob, best in records)


def _answer(answer: GenerationAnswer) -> dict[str, Any]:
    record = {field.name: getattr(answer, field.name) for field in fields(answer)}
    error = None if answer.error is None else pack_error(answer.error).decode()
    return record | {"logprobs": _choices(answer.logprobs), "error": error}


def _told(record: dict[str, Any]) -> GenerationAnswer:
    error = None if record["error"] is None else unpack_error(bytearray(record["error"].encode()))
    logprobs, tokens = _chosen(record["logprobs"]), tuple(record["tokens"])
    return replace(GenerationAnswer(**record), tokens=tokens, logprobs=logprobs, error=error)
