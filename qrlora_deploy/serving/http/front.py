"""The routes of the HTTP front."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.serving.access import Access, key_of, open_access
from qrlora_deploy.serving.answering import Question, answer
from qrlora_deploy.serving.engine.rows import RowAnswer
from qrlora_deploy.serving.http.bodies import body_of, parsed
from qrlora_deploy.serving.http.classify import classify_answer, parse_classify
from qrlora_deploy.serving.http.completions import Completions, openai_error
from qrlora_deploy.serving.http.embeddings import embeddings_answer, parse_embeddings
from qrlora_deploy.serving.http.endpoint import (
    CUSTOMERS,
    GIVE_UP,
    SPANS,
    TIMEOUT,
    Endpoint,
    Handler,
    Outcome,
    customers_of,
    header_of,
    request_id_of,
    scraped,
    spans_of,
)
from qrlora_deploy.serving.http.live_page import LivePage, Shown
from qrlora_deploy.serving.http.openapi import openapi
from qrlora_deploy.serving.http.protocol import InferAnswer, parse_infer, parse_object, write_answer
from qrlora_deploy.serving.http.replies import JSON, Whole, error_reply, json_reply
from qrlora_deploy.serving.inference.describing import (
    model_config,
    model_metadata,
    model_stats,
    repository_index,
    server_metadata,
)
from qrlora_deploy.serving.inference.questions import deadline_of, question_of
from qrlora_deploy.serving.inference.requests import InferRequest
from qrlora_deploy.serving.json_log import log_request
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.live.totals import RequestCounts
from qrlora_deploy.serving.live.window import Window
from qrlora_deploy.serving.outputs import OUTPUTS, answer_parameters, outputs_of
from qrlora_deploy.serving.parts import Keys, LiveNumbers, Metrics, Spans, Tracing
from qrlora_deploy.serving.served import VERSION, Models, ServedModel

HEADER_LENGTH = "inference-header-content-length"
BINARY = "application/octet-stream"


@dataclass
class Front:
    """Answers over HTTP.

    Attributes:
        models: what is served.
        life: whether requests are taken.
        keys: who may ask; None: everybody.
        metrics: counts; None: nobody does.
        counts: of this front and those beside it, for the live page.
        window: what that page shows; None: of `counts` and the engines.
        tracing: begins spans; None: there are none.
    """

    models: Models
    life: Life = field(default_factory=Life)
    keys: Keys | None = None
    metrics: Metrics | None = None
    counts: RequestCounts = field(default_factory=RequestCounts)
    window: LiveNumbers | None = None
    tracing: Tracing | None = None

    def __post_init__(self) -> None:
        self.live_window: LiveNumbers = self.window or Window(self.counts.totals, self.models.stats)

    @property
    def shown(self) -> Iterable[Shown]:
        """Models that the live page shows."""
        return self.models

    def routes(self) -> list[Route]:
        """All of them. Health and the description of the interface need no key."""
        model, text = "/v2/models/{model}", Completions(self.models, self.life).handlers()
        routes = [
            self._route("/v2/health/live", "GET", self.live, is_open=True),
            self._route("/v2/health/ready", "GET", self.ready, is_open=True),
            self._route("/openapi.json", "GET", self.describe, is_open=True),
            self._route("/v1/classify", "POST", self.classify, asks=True),
            self._route("/v1/embeddings", "POST", self.embeddings, asks=True),
            *(self._route(path, how, it, asks=how == "POST", errors=openai_error) for path, how, it in text),
            self._route("/v2", "GET", self.server),
            self._route("/v2/", "GET", self.server),
            self._route("/v2/repository/index", "POST", self.index),
            self._route("/v2/models/stats", "GET", self.all_stats),
            *(
                self._route(f"{prefix}{rest}", method, handler, asks=rest == "/infer")
                for prefix in (model, f"{model}/versions/{{version}}")
                for rest, method, handler in (
                    ("/infer", "POST", self.infer),
                    ("", "GET", self.model),
                    ("/ready", "GET", self.model_ready),
                    ("/stats", "GET", self.stats),
                    ("/config", "GET", self.config),
                )
            ),
        ]
        if self.metrics is not None:
            routes.append(self._route("/metrics", "GET", partial(scraped, self.metrics)))
        page = LivePage(self.shown, self.life, self.live_window)
        return routes + [self._route(path, "GET", it, is_open=free) for path, it, free in page.handlers()]

    def _route(self, path: str, method: str, handler: Handler, **options: Any) -> Route:
        return Route(path, Endpoint(self, path, handler, **options), methods=[method])

    def access(self, request: Request) -> Access:
        """What a request's key may do.

        Raises:
            UnauthenticatedError: it has none that is known.
        """
        return open_access if self.keys is None else self.keys.access(key_of(header_of(request, "authorization")))

    def begin_spans(self, request: Request, endpoint: Endpoint) -> Spans | None:
        """The spans of a request, with the names of OpenTelemetry's conventions; None: nobody wants them."""
        if self.tracing is None:
            return None
        attributes = {
            "http.request.method": request.method,
            "http.route": endpoint.path,
            # The pattern, where the path has a part that the client chose.
            "url.path": endpoint.path,
            "url.scheme": request.url.scheme,
            "qrlora.request_id": request_id_of(request),
        }
        spans = self.tracing.begin(f"{request.method} {endpoint.path}", request.headers, attributes)
        request.scope["state"][SPANS] = spans
        return spans

    def tell(self, request: Request, outcome: Outcome, endpoint: Endpoint) -> None:
        """Count a request and log it."""
        customers, code, seconds = customers_of(request), outcome.code, outcome.seconds
        if self.metrics is not None:
            self.metrics.observe(endpoint.path, code, seconds, len(customers), customers)
        if endpoint.asks:
            self.counts.count(seconds, len(customers), outcome.reason)
        log_request(
            request_id_of(request),
            request.method,
            endpoint.path,
            code,
            seconds,
            len(customers),
            outcome.key_id,
            "" if self.tracing is None or (spans := spans_of(request)) is None else spans.trace_id,
        )

    def _model(self, request: Request) -> ServedModel:
        return self.models.find(request.path_params["model"], request.path_params.get("version"))

    async def live(self, request: Request, access: Access) -> Response:
        """The process runs, and what it runs goes on."""
        live = self.life.live
        return json_reply({"live": live}, 200 if live else 503)

    async def ready(self, request: Request, access: Access) -> Response:
        """Requests are welcome."""
        ready = self.life.ready and all(model.ready for model in self.models)
        return json_reply({"ready": ready}, 200 if ready else 503)

    async def model_ready(self, request: Request, access: Access) -> Response:
        """The same for a model."""
        model = self._model(request)
        ready = self.life.ready and model.ready
        return json_reply({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def describe(self, request: Request, access: Access) -> Response:
        """What people and tools read to use this."""
        return json_reply(openapi())

    async def server(self, request: Request, access: Access) -> Response:
        """Name, version, extensions."""
        return json_reply(server_metadata())

    async def model(self, request: Request, access: Access) -> Response:
        """A model's inputs and outputs."""
        return json_reply(model_metadata(self._model(request)))

    async def config(self, request: Request, access: Access) -> Response:
        """The same as Triton's tools want it."""
        return json_reply(model_config(self._model(request)))

    async def stats(self, request: Request, access: Access) -> Response:
        """Counters of a model's engine."""
        return json_reply({"model_stats": [model_stats(self._model(request))]})

    async def all_stats(self, request: Request, access: Access) -> Response:
        """Counters of all engines."""
        return json_reply({"model_stats": [model_stats(model) for model in self.models]})

    async def index(self, request: Request, access: Access) -> Response:
        """All models; those that are ready, where the body asks so."""
        body = await body_of(request)
        record = parse_object(body) if body else {}
        found = repository_index(self.models, self.life.ready)
        return json_reply([model for model in found if model["state"] == "READY"] if record.get("ready") else found)

    async def classify(self, request: Request, access: Access) -> Response:
        """Texts in plain JSON."""
        self.models.check_room()
        question, customers, name = await parsed(
            await body_of(request), lambda body: parse_classify(parse_object(body))
        )
        model = self.models.find(name)
        if not model.task.has_labels and not model.task.writes_text:
            raise MalformedInputError(f"the model {model.name} answers with embeddings; ask /v1/embeddings")
        deadline_s = deadline_of(header_of(request, TIMEOUT))
        answers = await self._answer(request, model, question, customers, deadline_s, access)
        return json_reply(classify_answer(model, customers, answers))

    async def embeddings(self, request: Request, access: Access) -> Response:
        """Vectors of texts, as clients of OpenAI's interface ask for them."""
        self.models.check_room()
        asked = await parsed(await body_of(request), lambda body: parse_embeddings(parse_object(body)))
        model = self.models.find(asked.model)
        if model.task.has_labels:
            raise MalformedInputError(f"the model {model.name} answers with labels, not embeddings; ask /v1/classify")
        deadline_s = deadline_of(header_of(request, TIMEOUT))
        answers = await self._answer(request, model, asked.question, asked.customers, deadline_s, access)
        return json_reply(embeddings_answer(model, asked, answers))

    async def infer(self, request: Request, access: Access) -> Response:
        """The protocol's inference."""
        model = self._model(request)
        model.engine.check_room()
        length, outputs = _header_length(request), outputs_of(model.task)
        asked = await parsed(await body_of(request), lambda body: parse_infer(body, length, outputs))
        question, customers = question_of(asked)
        deadline_s = deadline_of(header_of(request, TIMEOUT), asked.parameters.get("timeout"))
        answers = await self._answer(request, model, question, customers, deadline_s, access)
        return _infer_reply(_written(model, asked, answers))

    async def _answer(
        self,
        request: Request,
        model: ServedModel,
        question: Question,
        customers: list[str | None],
        deadline_s: float | None,
        access: Access,
    ) -> list[RowAnswer]:
        state, task = request.scope["state"], asyncio.current_task()
        state[CUSTOMERS] = customers
        if task is not None:
            state[GIVE_UP] = task.cancel
        self.life.check()
        return await answer(model, question, customers, deadline_s, access, spans_of(request))


async def not_found(request: Request, error: Exception) -> Response:
    """A path or method that there is not."""
    code = getattr(error, "status_code", 404)
    headers = getattr(error, "headers", None) or {}
    what = f"is not asked that way, but by {headers.get('Allow')}" if code == 405 else "is not there"
    reply = error_reply(f"{request.url.path[:120]!a} {what}; GET /openapi.json lists what is", code)
    reply.headers.update(headers)
    return reply


def _header_length(request: Request) -> int | None:
    text = header_of(request, HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise MalformedInputError("Inference-Header-Content-Length must be a whole number of bytes")
    return int(text)


def _written(model: ServedModel, asked: InferRequest, answers: list[RowAnswer]) -> InferAnswer:
    values = [(wanted, OUTPUTS[wanted.name](answers, model.task)) for wanted in asked.wanted]
    return write_answer(
        model.name, VERSION, asked.id, values, answer_parameters(model.bundle.manifest.base_digest, answers)
    )


def _infer_reply(written: InferAnswer) -> Response:
    reply = Whole(written.body, media_type=JSON if written.header_length is None else BINARY)
    if written.header_length is not None:
        reply.headers[HEADER_LENGTH] = str(written.header_length)
    return reply
