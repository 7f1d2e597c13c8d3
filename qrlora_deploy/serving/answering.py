"""From a request to its answers: admit, tokenise in a thread, queue, wait. HTTP and gRPC come through here."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from qrlora_deploy.errors import InputError, MalformedInputError, QrloraError, UnknownCustomerError
from qrlora_deploy.serving.engine.handover import handover_here
from qrlora_deploy.serving.engine.protocol import Ticket
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer
from qrlora_deploy.serving.parts import Spans
from qrlora_deploy.serving.refusals import DeadlineError, RefusalError
from qrlora_deploy.serving.served import ServedModel

UNKNOWN = "no customer of that name is known here, or this key may not use it; check the name and the key"
"""One text for both: nobody learns by it which customers there are."""

UNUSABLE = "the file of a customer in this request cannot be used by this server; its log says why"

SHORT_BYTES = 512
"""Of a request's texts or token ids: with so few, handing them to a thread takes longer than tokenising them."""

FAILED = "the server failed to answer; its log says why"

WRITES_TEXT = "the model {name} writes text; ask /v1/completions or /v1/chat/completions"

logger = logging.getLogger(__name__)


class Allows(Protocol):
    """What a key may do."""

    @property
    def key_id(self) -> str:
        """Of the key; empty where none was asked for."""

    def allows(self, customer: str) -> bool:
        """Whether it may use a customer, be there one of that name or not."""


@dataclass(frozen=True)
class Texts:
    """What is asked, as texts.

    Attributes:
        texts: the texts, or the first ones of the pairs.
        pairs: the second texts, one per text; None: there are none.
    """

    texts: Sequence[str]
    pairs: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TokenIds:
    """What is asked, as a client tokenised it.

    Attributes:
        inputs: int64 `[n, length]` by name, as for `RowTokenizer.rows_of_ids`.
    """

    inputs: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


Question = Texts | TokenIds


async def answer(
    model: ServedModel,
    question: Question,
    customers: Sequence[str | None],
    deadline_s: float | None = None,
    access: Allows | None = None,
    spans: Spans | None = None,
) -> list[RowAnswer]:
    """Answer every row, in the order given.

    Args:
        model: who answers.
        question: texts or token ids.
        customers: one for each row, None being the base.
        deadline_s: a time of `time.monotonic` after which nobody waits for the answer.
        access: of the key that asks; None: everything is allowed.
        spans: are told of the stages; None: nobody wants to know.

    Raises:
        QrloraError: as `Engine.admit` and `Engine.submit` say. Its message holds no path of the server.
    """
    if spans is not None:
        spans.asks(model.name, customers)
        spans.stage("admit")
    if model.writer is not None:
        raise MalformedInputError(WRITES_TEXT.format(name=model.name))
    _check_counts(question, customers)
    _check_kind(model, question)
    if access is not None and not all(access.allows(name) for name in set(customers) if name is not None):
        raise UnknownCustomerError(UNKNOWN)
    load = _load(model, question, "" if access is None else access.key_id)
    ticket = model.engine.admit(load, customers, deadline_s)
    try:
        if ticket.pending is not None:
            await in_time(ticket.pending, deadline_s)
        if spans is not None:
            spans.stage("tokenise")
        rows = await _tokenised(model, question, customers, load)
    except BaseException:
        model.engine.release(ticket)
        raise
    if spans is not None:
        spans.has_tokens(sum(row.length for row in rows))
        spans.stage("wait")
    try:
        answers = await _answered(model, ticket, rows, deadline_s)
    except QrloraError as error:
        raise public_error(error) from error
    if spans is not None:
        spans.ran(list({id(it.run): it.run for it in answers if it.run is not None}.values()))
    return answers


def _check_counts(question: Question, customers: Sequence[str | None]) -> None:
    if not len(question):
        raise MalformedInputError("the request holds no texts; give at least one")
    if isinstance(question, Texts) and question.pairs is not None and len(question.pairs) != len(question):
        raise MalformedInputError(f"there are {len(question)} texts but {len(question.pairs)} second texts")
    if len(customers) != len(question):
        raise MalformedInputError(f"there are {len(question)} texts but {len(customers)} customers")


def _check_kind(model: ServedModel, question: Question) -> None:
    if model.task.needs_pairs and isinstance(question, Texts) and question.pairs is None:
        raise MalformedInputError(f"the model {model.name} scores pairs of texts; give the second texts too")


def _load(model: ServedModel, question: Question, asker: str) -> Load:
    if isinstance(question, Texts):
        return Load.of_texts(question.texts, question.pairs, model.tokenizer.max_length, asker)
    ids = question.inputs["input_ids"]
    return Load(len(ids), ids.size, sum(array.nbytes for array in question.inputs.values()), asker)


async def in_time(pending: Awaitable[None], deadline_s: float | None) -> None:
    """Wait for a place.

    Raises:
        DeadlineError: the request's time has passed before.
        QrloraError: it is refused.
    """
    try:
        async with asyncio.timeout(None if deadline_s is None else max(0.0, deadline_s - time.monotonic())):
            await pending
    except TimeoutError as error:
        raise DeadlineError("the request's time had passed before it was queued") from error


async def _tokenised(model: ServedModel, question: Question, customers: Sequence[str | None], load: Load) -> list[Row]:
    if isinstance(question, Texts):
        make = partial(model.tokenizer.rows, question.texts, question.pairs, customers)
    else:
        make = partial(model.tokenizer.rows_of_ids, question.inputs, customers)
    if load.size_bytes <= SHORT_BYTES:
        return make()
    return await asyncio.get_running_loop().run_in_executor(model.pool, make)


async def _answered(
    model: ServedModel, ticket: Ticket, rows: Sequence[Row], deadline_s: float | None
) -> list[RowAnswer]:
    if deadline_s is not None and time.monotonic() >= deadline_s:
        model.engine.release(ticket)
        raise DeadlineError("the request's time had passed before it was queued")
    # Whoever stops to wait, by the deadline or since the client has gone, cancels the rows that still wait.
    waiting = _in_this_loop(model.engine.submit(ticket, rows))
    if deadline_s is None:
        return await waiting
    late = waiting.get_loop().call_later(max(0.0, deadline_s - time.monotonic()), _give_up, waiting)
    try:
        return await waiting
    finally:
        late.cancel()


def _give_up(waiting: "asyncio.Future[list[RowAnswer]]") -> None:
    if not waiting.done():
        waiting.set_exception(DeadlineError("the request's time passed before it was answered"))


def _in_this_loop(future: "Future[list[RowAnswer]]") -> "asyncio.Future[list[RowAnswer]]":
    """As `asyncio.wrap_future`, with one wake-up of the loop for all that end together."""
    waiting: asyncio.Future[list[RowAnswer]] = asyncio.get_running_loop().create_future()
    handover = handover_here()

    def hand_over() -> None:
        if waiting.done():
            return
        if future.cancelled():
            waiting.cancel()
        elif (error := future.exception()) is not None:
            waiting.set_exception(error)
        else:
            waiting.set_result(future.result())

    future.add_done_callback(lambda _: handover.add(hand_over))
    # Done before the engine is: nobody waits any more. What has ended takes no notice.
    waiting.add_done_callback(lambda _: future.cancel())
    return waiting


def public_error(error: QrloraError) -> QrloraError:
    """The error that a client may see: files and folders of the server are none of its business."""
    if isinstance(error, UnknownCustomerError):
        return UnknownCustomerError(UNKNOWN)
    if isinstance(error, MalformedInputError | RefusalError) or error.kind == "not_ready":
        return error
    logger.warning("a request failed: %s", error)
    return InputError(UNUSABLE) if isinstance(error, InputError) else QrloraError(FAILED)
