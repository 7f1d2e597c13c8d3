"""`/v1/completions`, `/v1/chat/completions` and `/v1/models`: text, in the shape of OpenAI's interface."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qrlora_deploy.errors import MalformedInputError, QrloraError, UnknownCustomerError
from qrlora_deploy.serving.access import Access
from qrlora_deploy.serving.answering import UNKNOWN, public_error
from qrlora_deploy.serving.generation.asking import Answers, ask
from qrlora_deploy.serving.generation.protocol import TextWriter
from qrlora_deploy.serving.http.bodies import body_of, parsed
from qrlora_deploy.serving.http.completions_answer import Shape
from qrlora_deploy.serving.http.completions_request import TextRequest, parse_chat, parse_completion, split_name
from qrlora_deploy.serving.http.endpoint import CUSTOMERS, ENDED_BY, GIVE_UP, TIMEOUT, Handler, spans_of
from qrlora_deploy.serving.http.protocol import parse_object
from qrlora_deploy.serving.http.replies import INTERNAL, json_reply, reply_to_error
from qrlora_deploy.serving.inference.questions import deadline_of
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.refusals import reason_of, status_of
from qrlora_deploy.serving.served import Models, ServedModel

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""What OpenAI calls errors of a status; of others below 500 it is the request's."""

EVENTS = "text/event-stream; charset=utf-8"

DONE = b"data: [DONE]\n\n"

UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Proxies hand a stream on as it comes."""


class Completions:
    """Handlers of the routes that write text.

    Args:
        models: what is served.
        life: whether requests are taken.
    """

    def __init__(self, models: Models, life: Life) -> None:
        self._models, self._life, self._since_s = models, life, int(time.time())

    def handlers(self) -> Iterator[tuple[str, str, Handler]]:
        """Path, method and handler of each route."""
        yield "/v1/completions", "POST", self.completions
        yield "/v1/chat/completions", "POST", self.chat
        yield "/v1/models", "GET", self.list
        yield "/v1/models/{model}", "GET", self.model

    async def completions(self, request: Request, access: Access) -> Response:
        """Go on with texts."""
        return await self._write(request, access, parse_completion)

    async def chat(self, request: Request, access: Access) -> Response:
        """Answer a chat."""
        return await self._write(request, access, parse_chat)

    async def list(self, request: Request, access: Access) -> Response:
        """Every model, without customers, who may be many."""
        return json_reply({"object": "list", "data": [self._described(model, model.name) for model in self._models]})

    async def model(self, request: Request, access: Access) -> Response:
        """A model, or a customer of one."""
        name, customer = split_name(request.path_params["model"])
        model = self._models.find(name)
        if customer is None:
            return json_reply(self._described(model, model.name))
        if not access.allows(customer):
            raise UnknownCustomerError(UNKNOWN)
        writer = writer_of(model)
        try:
            await asyncio.get_running_loop().run_in_executor(model.pool, writer.check_customer, customer)
        except QrloraError as error:
            raise public_error(error) from error
        return json_reply(self._described(model, f"{model.name}:{customer}"))

    def _described(self, model: ServedModel, name: str) -> dict[str, Any]:
        manifest = model.bundle.manifest
        return {
            "id": name,
            "object": "model",
            "created": self._since_s,
            "owned_by": "qrlora-deploy",
            "task": manifest.task,
            "max_model_len": manifest.max_length,
            "base_digest": manifest.base_digest,
        }

    async def _write(
        self, request: Request, access: Access, parse: Callable[[Mapping[str, Any]], TextRequest]
    ) -> Response:
        self._models.check_room()
        asked = await parsed(await body_of(request), lambda body: parse(parse_object(body)))
        model = self._models.find(asked.model)
        writer = writer_of(model)
        request.scope["state"][CUSTOMERS] = [asked.customer] * (asked.copies * len(asked.requests))
        task = asyncio.current_task()
        if task is not None:
            request.scope["state"][GIVE_UP] = task.cancel
        self._life.check()
        deadline_s = deadline_of(request.headers.get(TIMEOUT))
        answers = await ask(
            model, writer, asked.requests, asked.copies, deadline_s, access, spans_of(request), asked.stream
        )
        name = model.name if asked.customer is None else f"{model.name}:{asked.customer}"
        shape = Shape(asked, name, model.bundle.manifest.base_digest, writer.prompts.text_of)
        if asked.stream:
            return await _streamed(answers, shape, request)
        try:
            return json_reply(shape.whole(await answers.whole()))
        finally:
            answers.close()


def writer_of(model: ServedModel) -> TextWriter:
    """What writes a model's text.

    Raises:
        MalformedInputError: it writes none.
    """
    if model.writer is None:
        other = "/v1/classify" if model.task.has_labels else "/v1/embeddings"
        raise MalformedInputError(f"the model {model.name} writes no text; ask {other}")
    return model.writer


async def _streamed(answers: Answers, shape: Shape, request: Request) -> Response:
    """A stream, once the first thing has happened: what is refused until then has a status of its own."""
    try:
        first = await answers.next()
    except BaseException:
        answers.close()
        raise

    async def pieces() -> AsyncIterator[bytes]:
        event = first
        try:
            while True:
                if (piece := shape.piece(event)) is not None:
                    yield _data(piece)
                if not answers.left:
                    break
                event = await answers.next()
            if (usage := shape.last()) is not None:
                yield _data(usage)
        except QrloraError as error:
            request.scope["state"][ENDED_BY] = reason_of(error)
            yield stream_error(error)
            return
        yield DONE

    return _Events(pieces(), answers)


class _Events(StreamingResponse):
    """A stream whose answers end with it, at its end or when the client goes."""

    def __init__(self, pieces: AsyncIterator[bytes], answers: Answers) -> None:
        super().__init__(pieces, headers=UNBUFFERED, media_type=EVENTS)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


def _data(record: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(record) + b"\n\n"


def stream_error(error: QrloraError) -> bytes:
    """The end of a stream for what it ended with."""
    return _data(_error(str(error), status_of(error).http, reason_of(error))) + DONE


def openai_error(error: Exception, request_id: str) -> Response:
    """The reply for what a request ended with, as OpenAI's clients read it."""
    reply = reply_to_error(error, request_id)
    message = str(error) if isinstance(error, QrloraError) else INTERNAL
    made = json_reply(_error(message, reply.status_code, reason_of(error)), reply.status_code)
    for name in ("retry-after", "www-authenticate"):
        if name in reply.headers:
            made.headers[name] = reply.headers[name]
    return made


def _error(message: str, code: int, reason: str) -> dict[str, Any]:
    kind = TYPES.get(code, "invalid_request_error" if code < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": reason}}
