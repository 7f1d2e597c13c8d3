"""The methods of the protocol's service."""

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.access import Access, open_access
from qrlora_deploy.serving.answering import answer
from qrlora_deploy.serving.grpc.calls import Call, Metadata, key_in
from qrlora_deploy.serving.grpc.reading import parse, read_infer
from qrlora_deploy.serving.grpc.schema import METHODS, SERVICE
from qrlora_deploy.serving.grpc.writing import write_infer
from qrlora_deploy.serving.inference.describing import model_config, model_metadata, model_stats, server_metadata
from qrlora_deploy.serving.inference.questions import deadline_of, question_of
from qrlora_deploy.serving.json_log import log_request
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.live.totals import RequestCounts
from qrlora_deploy.serving.outputs import OUTPUTS, answer_parameters, outputs_of
from qrlora_deploy.serving.parts import Keys, Metrics, Tracing
from qrlora_deploy.serving.refusals import GONE, OverloadedError, reason_of, status_of
from qrlora_deploy.serving.served import VERSION, Models
from qrlora_deploy.version import __version__

OK, CANCELLED = 200, 499
"""Calls are counted by the status that HTTP has for the same; 499 is the usual one for a client that has gone."""

MAX_HELD_BYTES = 2**30

_NAMES = {f"/{SERVICE}/{name}": name for name in METHODS}

INFER = "ModelInfer"
"""The method that asks a model."""

OPEN = ("ServerLive", "ServerReady", "ModelReady")
"""Methods that need no key: probes have none."""


class InferenceService(grpc.GenericRpcHandler):
    """Answers over gRPC, as `Front` does over HTTP.

    Args:
        models: what is served.
        life: whether requests are taken.
        keys: who may ask; None: everybody.
        metrics: counts; None: nobody does.
        max_held_bytes: of all messages that are being answered at a time.
        counts: of requests, for the live page; None: nobody looks.
        tracing: begins spans; None: there are none.

    Attributes:
        running: calls that are being answered.
        begun: calls since the start.
    """

    def __init__(
        self,
        models: Models,
        life: Life,
        keys: Keys | None = None,
        metrics: Metrics | None = None,
        max_held_bytes: int = MAX_HELD_BYTES,
        counts: RequestCounts | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.models, self.life, self.keys, self.metrics = models, life, keys, metrics
        self.counts, self.tracing = counts or RequestCounts(), tracing
        self.max_held_bytes = max_held_bytes
        self.running = self.begun = self._held = 0

    def service(self, details: Any) -> grpc.RpcMethodHandler | None:
        """What gRPC asks for at the begin of a call, before its message is read; None: it is no call of this service.

        A call without a key ends here, so that nobody has memory taken by it, and one that there is no room for.
        """
        name = _NAMES.get(details.method)
        if name is None:
            return None
        self.begun += 1
        try:
            access = self._admit(name, details.invocation_metadata)
        except QrloraError as error:
            # Of a stream no message is read that nobody asks for.
            return grpc.stream_unary_rpc_method_handler(partial(self._refuse, name, error))
        # Bytes, since gRPC answers what it cannot parse by INTERNAL.
        return grpc.unary_unary_rpc_method_handler(
            partial(self._handle, name, access), None, METHODS[name][1].SerializeToString
        )

    def _admit(self, name: str, metadata: Metadata) -> Access:
        access = open_access
        if self.keys is not None and name not in OPEN:
            access = self.keys.access(key_in(metadata))
        if self._held > self.max_held_bytes:
            raise OverloadedError("too many large messages are being answered; try again soon")
        if name == INFER:
            self.models.check_room()
        return access

    async def _refuse(self, name: str, error: QrloraError, messages: Any, context: grpc.aio.ServicerContext) -> None:
        call = self._begin(context, open_access, name)
        self._tell(call, name, status_of(error).http, 0.0, reason_of(error))
        await call.refuse(error)

    async def _handle(self, name: str, access: Access, body: bytes, context: grpc.aio.ServicerContext) -> Any:
        """Answer a call: errors as statuses, and counting."""
        start, code, reason, call = time.perf_counter(), CANCELLED, GONE, self._begin(context, access, name)
        method: Callable[[Any, Call], Awaitable[Any]] = getattr(self, name)
        self.running += 1
        self._held += len(body)
        try:
            reply = await method(parse(METHODS[name][0], body), call)
            code, reason = OK, ""
            return reply
        except Exception as error:
            refusal = call.refusal_of(error)
            code, reason = status_of(refusal).http, reason_of(refusal)
            await call.refuse(refusal)
        finally:
            self.running -= 1
            self._held -= len(body)
            self._tell(call, name, code, time.perf_counter() - start, reason)

    def _begin(self, context: grpc.aio.ServicerContext, access: Access, name: str) -> Call:
        call = Call(context, access)
        if self.tracing is not None and name == INFER:
            call.begin_spans(self.tracing, f"{SERVICE}/{name}")
        return call

    def _tell(self, call: Call, name: str, code: int, seconds: float, reason: str) -> None:
        """Count a call and log it."""
        route, rows = f"/{SERVICE}/{name}", len(call.customers)
        if self.metrics is not None:
            self.metrics.observe(route, code, seconds, rows, call.customers)
        if name == INFER:
            self.counts.count(seconds, rows, reason)
        trace_id = "" if call.spans is None else call.spans.trace_id
        log_request(call.request_id, "grpc", route, code, seconds, rows, call.access.key_id, trace_id)
        call.end_spans(reason, code)

    async def ServerLive(self, message: Any, call: Call) -> Any:
        """The process runs, and what it runs goes on."""
        return METHODS["ServerLive"][1](live=self.life.live)

    async def ServerReady(self, message: Any, call: Call) -> Any:
        """Requests are welcome."""
        ready = self.life.ready and all(model.ready for model in self.models)
        return METHODS["ServerReady"][1](ready=ready)

    async def ModelReady(self, message: Any, call: Call) -> Any:
        """The same for a model."""
        model = self.models.find(message.name, message.version)
        return METHODS["ModelReady"][1](ready=self.life.ready and model.ready)

    async def ServerMetadata(self, message: Any, call: Call) -> Any:
        """Name and version, and Triton's extensions; binary data is none here."""
        return METHODS["ServerMetadata"][1](
            name=server_metadata()["name"], version=__version__, extensions=("statistics", "model_configuration")
        )

    async def ModelMetadata(self, message: Any, call: Call) -> Any:
        """A model's inputs and outputs."""
        model = self.models.find(message.name, message.version)
        found = model_metadata(model)
        # The message has no field for the parameters.
        return METHODS["ModelMetadata"][1](**{name: found[name] for name in found if name != "parameters"})

    async def ModelConfig(self, message: Any, call: Call) -> Any:
        """A model's inputs and outputs in Triton's words."""
        found = model_config(self.models.find(message.name, message.version))
        return ParseDict({"config": found}, METHODS["ModelConfig"][1]())

    async def ModelStatistics(self, message: Any, call: Call) -> Any:
        """What a model has answered, or where none is named each."""
        named = [self.models.find(message.name, message.version)] if message.name else self.models
        return ParseDict({"model_stats": list(map(model_stats, named))}, METHODS["ModelStatistics"][1]())

    async def ModelInfer(self, message: Any, call: Call) -> Any:
        """The protocol's inference."""
        model = self.models.find(message.model_name, message.model_version)
        asked = read_infer(message, outputs_of(model.task))
        question, customers = question_of(asked)
        call.customers = customers
        self.life.check()
        limits = (call.deadline_s, deadline_of(None, asked.parameters.get("timeout")))
        deadline_s = min((limit for limit in limits if limit is not None), default=None)
        answers = await answer(model, question, customers, deadline_s, call.access, call.spans)
        values = [(wanted, OUTPUTS[wanted.name](answers, model.task)) for wanted in asked.wanted]
        parameters = answer_parameters(model.bundle.manifest.base_digest, answers)
        return write_infer(model.name, VERSION, asked.id, values, parameters)
