"""From a request over a network to the events of its answers: admit, tokenise in a thread, queue, listen."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from qrlora_deploy.errors import InputError, MalformedInputError, QrloraError, UnknownCustomerError
from qrlora_deploy.runtime.generation.prompts import check_room
from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationEvent, GenerationRequest
from qrlora_deploy.runtime.generation.sampling import MOST_SEED
from qrlora_deploy.serving.answering import UNKNOWN, Allows, in_time, public_error
from qrlora_deploy.serving.engine.rows import SPECIAL_TOKENS, Load
from qrlora_deploy.serving.engine.waiting_room import CLOSED
from qrlora_deploy.serving.generation.protocol import TextWriter
from qrlora_deploy.serving.parts import Spans
from qrlora_deploy.serving.refusals import DeadlineError, DrainingError
from qrlora_deploy.serving.served import ServedModel

MESSAGE_TOKENS = 64
"""Tokens that a chat template may put around a message; what is reserved is corrected once they are known."""

TOKEN_BYTES = 8
"""Of a token that comes as a number."""


class Answers:
    """The events of a request's answers. Close it, whatever happens: then nothing more is written for it.

    Args:
        engine: writes.
        writing: what it writes; `tell` puts events into `events`.
        count: of the answers.
        events: None ends nothing: every answer's last event has its `answer`.
        deadline_s: a time of `time.monotonic` after which nobody waits.
    """

    def __init__(
        self,
        engine: TextWriter,
        writing: Any,
        count: int,
        events: "asyncio.Queue[GenerationEvent]",
        deadline_s: float | None,
    ) -> None:
        self._engine, self._writing, self._events, self._deadline_s = engine, writing, events, deadline_s
        self.left = count

    async def next(self) -> GenerationEvent:
        """The next event, of any of the answers.

        Raises:
            QrloraError: the answer that it is of failed, or the deadline passed.
        """
        left_s = None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())
        try:
            async with asyncio.timeout(left_s):
                event = await self._events.get()
        except TimeoutError as error:
            raise DeadlineError("the request's time passed before it was answered") from error
        if event.answer is not None:
            self.left -= 1
            _check(event.answer)
        return event

    async def whole(self) -> list[GenerationAnswer]:
        """Every answer, in the order of the requests.

        Raises:
            QrloraError: one failed, or the deadline passed.
        """
        found: dict[int, GenerationAnswer] = {}
        while self.left:
            event = await self.next()
            if event.answer is not None:
                found[event.number] = event.answer
        return [found[number] for number in sorted(found)]

    def close(self) -> None:
        """Cancel what is not at its end."""
        if self.left:
            self._engine.cancel(self._writing)


async def ask(
    model: ServedModel,
    engine: TextWriter,
    requests: Sequence[GenerationRequest],
    copies: int = 1,
    deadline_s: float | None = None,
    access: Allows | None = None,
    spans: Spans | None = None,
    every: bool = True,
) -> Answers:
    """Queue requests.

    Args:
        model: who answers.
        engine: its writer.
        requests: of one customer.
        copies: answers to each, side by side: those of request r are r * copies and on. With a seed each one's is
            one more than that of the one before.
        deadline_s: a time of `time.monotonic` after which nobody waits for the answers.
        access: of the key that asks; None: everything is allowed.
        spans: are told of the stages; None: nobody wants to know.
        every: False: events are the last ones alone.

    Raises:
        QrloraError: as `TextEngine.admit` and `TextEngine.write` say. Its message holds no path of the server.
    """
    customers = [request.customer for request in requests for _ in range(copies)]
    if spans is not None:
        spans.asks(model.name, customers)
        spans.stage("admit")
    if access is not None and not all(access.allows(name) for name in set(customers) if name is not None):
        raise UnknownCustomerError(UNKNOWN)
    load = load_of(requests, copies, engine.prompts.longest, "" if access is None else access.key_id)
    ticket = engine.admit(load, customers, deadline_s)
    try:
        if ticket.pending is not None:
            await in_time(ticket.pending, deadline_s)
        if spans is not None:
            spans.stage("tokenise")
        prepare = partial(_prepared, model, engine, requests, copies)
        prepared = await asyncio.get_running_loop().run_in_executor(model.pool, prepare)
        if deadline_s is not None and time.monotonic() >= deadline_s:
            raise DeadlineError("the request's time had passed before it was queued")
        if spans is not None:
            spans.has_tokens(sum(len(request.prompt) for request in prepared))
            spans.stage("wait")
        loop, events = asyncio.get_running_loop(), asyncio.Queue[GenerationEvent]()

        def tell(event: GenerationEvent) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        return Answers(engine, engine.write(ticket, prepared, tell, every), len(prepared), events, deadline_s)
    except BaseException as error:
        engine.release(ticket)
        if isinstance(error, QrloraError):
            raise public_error(error) from error
        raise


def load_of(requests: Sequence[GenerationRequest], copies: int, longest: int, asker: str = "") -> Load:
    """The most that requests can take, without tokenising them: no prompt has more tokens than bytes, but for what a
    template puts around them, and none with its answer more than the model takes."""
    sizes = [_size(request) for request in requests]
    tokens = sum(
        min(size // per_token + around + request.max_tokens, longest)
        for request, (size, per_token, around) in zip(requests, sizes, strict=True)
    )
    total = sum(size for size, _, _ in sizes)
    return Load(copies * len(requests), copies * tokens, total, asker)


def _size(request: GenerationRequest) -> tuple[int, int, int]:
    """Bytes of a prompt, bytes that a token has at least, and tokens around them at most."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8", "surrogatepass")), 1, SPECIAL_TOKENS
    texts = [item["content"] for item in prompt if not isinstance(item, int)]
    if not texts:
        return TOKEN_BYTES * len(prompt), TOKEN_BYTES, 0
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts), 1, MESSAGE_TOKENS * (1 + len(texts))


def _prepared(
    model: ServedModel, engine: TextWriter, requests: Sequence[GenerationRequest], copies: int
) -> list[GenerationRequest]:
    """Requests with ids of tokens, each as often as there are copies. In a thread."""
    found = []
    for request in requests:
        made = _prepared_chat(model, engine, request) if _is_chat(request) else _with_tokens(engine, request)
        found += [_copy(made, number) for number in range(copies)]
    return found


def _prepared_chat(model: ServedModel, engine: TextWriter, request: GenerationRequest) -> GenerationRequest:
    if not engine.prompts.takes_chats:
        raise MalformedInputError(f"the model {model.name} has no chat template; ask /v1/completions")
    engine.check_customer(request.customer)
    try:
        return _with_tokens(engine, request)
    except UnknownCustomerError:
        raise
    except InputError as error:
        # The customer is there, so it is the chat: what a template says of it is the asker's business.
        raise MalformedInputError(str(error)) from error


def _with_tokens(engine: TextWriter, request: GenerationRequest) -> GenerationRequest:
    """The request with ids of tokens as its prompt, and as many tokens as there is room for. It may wait for a
    customer's file.

    Raises:
        MalformedInputError: the prompt is empty, too long or cannot be read.
        UnknownCustomerError: there is no such customer.
        InputError: the customer's file cannot be served.
    """
    engine.check_customer(request.customer)
    prompt, longest = engine.prompts.read(request), engine.prompts.longest
    return replace(request, prompt=prompt, max_tokens=check_room(prompt, request.max_tokens, longest))


def _is_chat(request: GenerationRequest) -> bool:
    return not isinstance(request.prompt, str) and any(not isinstance(item, int) for item in request.prompt)


def _copy(request: GenerationRequest, number: int) -> GenerationRequest:
    seed = request.sampling.seed
    if not number or seed is None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=(seed + number) % (MOST_SEED + 1)))


def _check(answer: GenerationAnswer) -> None:
    if answer.error is not None:
        raise public_error(answer.error) from answer.error
    if answer.finish_reason == "cancelled":
        raise DrainingError(CLOSED)
    if answer.finish_reason == "deadline":
        raise DeadlineError("the request's time passed before it was answered")
