"""The methods of the protocol's service."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from qrlora_deploy.serving.answering import answer
from qrlora_deploy.serving.grpc.calls import Call
from qrlora_deploy.serving.grpc.reading import parse, read_infer
from qrlora_deploy.serving.grpc.schema import METHODS, SERVICE
from qrlora_deploy.serving.grpc.writing import write_infer
from qrlora_deploy.serving.inference.describing import model_metadata, server_metadata
from qrlora_deploy.serving.inference.questions import deadline_of, question_of
from qrlora_deploy.serving.json_log import log_request
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.outputs import OUTPUTS, answer_parameters, outputs_of
from qrlora_deploy.serving.parts import Keys, Metrics
from qrlora_deploy.serving.refusals import status_of
from qrlora_deploy.serving.served import VERSION, Models
from qrlora_deploy.version import __version__

OK, CANCELLED = 200, 499
"""Calls are counted by the status that HTTP has for the same; 499 is the usual one for a client that has gone."""

OPEN = ("ServerLive", "ServerReady", "ModelReady")
"""Methods that need no key: probes have none."""


class InferenceService:
    """Answers over gRPC, as `Front` does over HTTP.

    Attributes:
        models: what is served.
        life: whether requests are taken.
        keys: who may ask; None: everybody.
        metrics: counts; None: nobody does.
        running: calls that are being answered.
    """

    def __init__(self, models: Models, life: Life, keys: Keys | None = None, metrics: Metrics | None = None) -> None:
        self.models, self.life, self.keys, self.metrics = models, life, keys, metrics
        self.running = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """All methods, for a server."""
        methods = {name: self._method(name, *classes) for name, classes in METHODS.items()}
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _method(self, name: str, request_class: Any, response_class: Any) -> grpc.RpcMethodHandler:
        """A method with what all have in common: the key, errors as statuses, and counting."""
        method: Callable[[Any, Call], Awaitable[Any]] = getattr(self, name)

        async def handle(body: bytes, context: grpc.aio.ServicerContext) -> Any:
            start, code, call = time.perf_counter(), CANCELLED, Call(context)
            self.running += 1
            try:
                if self.keys is not None and name not in OPEN:
                    call.access = self.keys.access(call.key)
                reply = await method(parse(request_class, body), call)
                code = OK
                return reply
            except Exception as error:
                refusal = call.refusal_of(error)
                code = status_of(refusal).http
                await call.refuse(refusal)
            finally:
                self.running -= 1
                self._tell(call, f"/{SERVICE}/{name}", code, time.perf_counter() - start)

        # Bytes, since gRPC answers what it cannot parse by INTERNAL.
        return grpc.unary_unary_rpc_method_handler(handle, None, response_class.SerializeToString)

    def _tell(self, call: Call, route: str, code: int, seconds: float) -> None:
        """Count a call and log it."""
        rows = len(call.customers)
        if self.metrics is not None:
            self.metrics.observe(route, code, seconds, rows, call.customers)
        log_request(call.request_id, "grpc", route, code, seconds, rows, call.access.key_id)

    async def ServerLive(self, message: Any, call: Call) -> Any:
        """The process runs."""
        return METHODS["ServerLive"][1](live=True)

    async def ServerReady(self, message: Any, call: Call) -> Any:
        """Requests are welcome."""
        ready = self.life.ready and all(model.ready for model in self.models)
        return METHODS["ServerReady"][1](ready=ready)

    async def ModelReady(self, message: Any, call: Call) -> Any:
        """The same for a model."""
        model = self.models.find(message.name, message.version)
        return METHODS["ModelReady"][1](ready=self.life.ready and model.ready)

    async def ServerMetadata(self, message: Any, call: Call) -> Any:
        """Name and version; the extensions that HTTP has are none of gRPC's."""
        return METHODS["ServerMetadata"][1](name=server_metadata()["name"], version=__version__)

    async def ModelMetadata(self, message: Any, call: Call) -> Any:
        """A model's inputs and outputs."""
        model = self.models.find(message.name, message.version)
        known = METHODS["ModelMetadata"][1].DESCRIPTOR.fields_by_name
        return METHODS["ModelMetadata"][1](
            **{key: value for key, value in model_metadata(model).items() if key in known}
        )

    async def ModelInfer(self, message: Any, call: Call) -> Any:
        """The protocol's inference."""
        model = self.models.find(message.model_name, message.model_version)
        asked = read_infer(message, outputs_of(model.task))
        question, customers = question_of(asked)
        call.customers = customers
        self.life.check()
        limits = (call.deadline_s, deadline_of(None, asked.parameters.get("timeout")))
        deadline_s = min((limit for limit in limits if limit is not None), default=None)
        answers = await answer(model, question, customers, deadline_s, call.access)
        values = [(wanted, OUTPUTS[wanted.name](answers, model.task)) for wanted in asked.wanted]
        parameters = answer_parameters(model.bundle.manifest.base_digest, answers)
        return write_infer(model.name, VERSION, asked.id, values, parameters)
