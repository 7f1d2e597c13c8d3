"""Texts and names of customers in, answers out; the numbers of each row's customer go to the graph with its tokens."""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qrlora_deploy.errors import MalformedInputError, QrloraError, first_line
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.bundle.row_layout import TABLE_OF
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.customers.store import CustomerStore
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.loaded_customers import LoadedCustomers
from qrlora_deploy.runtime.sessions.versions import Version
from qrlora_deploy.serving.engine.rows import Row, RowAnswer
from qrlora_deploy.serving.inference.questions import CUSTOMER, PAIR, TEXT, owners
from qrlora_deploy.serving.tokenizing import RowTokenizer
from qrlora_deploy.serving.triton.batches import Batch, BatchMaker
from qrlora_deploy.serving.triton.tensors import front_inputs, output_array, texts_of
from qrlora_deploy.tasks.registry import task_named

logger = logging.getLogger(__name__)

CODES = {"unknown_customer": "NOT_FOUND", "malformed_input": "INVALID_ARG", "not_ready": "UNAVAILABLE"}
"""Triton's words for what is wrong, by `QrloraError.kind`; others are INTERNAL."""

UNKNOWN = "no customer of that name is known here; check the name"

UNUSABLE = "the file of a customer in this request cannot be used; the log of this model says why"


class GraphError(QrloraError):
    """The graph's model refused a batch, or failed."""


@dataclass(frozen=True)
class Settings:
    """The parameters of the model's configuration.

    Attributes:
        graph: name of the model that runs the graph.
        customers: folder of customers; empty: none.
        packed: packed file of customers; empty: none.
        poll: compare the folder's files instead of asking the system, for network folders.
        max_customers: that are kept in memory; 0: all.
        lengths: of rows, to which batches are padded, so that Triton can join them.
        max_batch: rows of a batch.
    """

    graph: str
    customers: str
    packed: str
    poll: bool
    max_customers: int
    lengths: tuple[int, ...]
    max_batch: int

    @classmethod
    def read(cls, model_config: str) -> "Settings":
        """From the configuration in JSON, as Triton gives it."""
        config = json.loads(model_config)
        said = {name: entry.get("string_value", "") for name, entry in config["parameters"].items()}
        return cls(
            graph=said["graph"],
            customers=said.get("customers", ""),
            packed=said.get("packed", ""),
            poll=said.get("poll", "") == "true",
            max_customers=int(said.get("max_customers") or 0),
            lengths=tuple(map(int, said["lengths"].split(","))),
            max_batch=max(1, int(config.get("max_batch_size", 1))),
        )


@dataclass
class _Asked:
    """One request, on its way: its rows, what they bring, and what came of them.

    Attributes:
        numbers: of each row's customer, `[n, width]` by the graph's input.
        answers: of the rows, as far as they are there.
        error: why there will be none.
    """

    rows: list[Row] = field(default_factory=list)
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    versions: list[Version] = field(default_factory=list)
    answers: dict[int, RowAnswer] = field(default_factory=dict)
    error: QrloraError | None = None


class Front:
    """What `model.py` of a repository hands its calls to.

    Args:
        backend: the module `triton_python_backend_utils`, which is in Triton's own process alone.
        arguments: of `initialize`.

    Raises:
        InputError: the model's folder is damaged, or its customers cannot be loaded.
    """

    def __init__(self, backend: Any, arguments: Mapping[str, str]) -> None:
        self._backend = backend
        self.settings = settings = Settings.read(arguments["model_config"])
        bundle = open_bundle(Path(arguments["model_repository"]) / arguments["model_version"], graph=False)
        self.bundle, self.task = bundle, task_named(bundle.manifest.task)
        # One row is the base's.
        self.customers = LoadedCustomers(
            bundle, max_rows=settings.max_customers + 1 if settings.max_customers else None
        )
        self._tokenizer = RowTokenizer(bundle)
        self._batches = BatchMaker(bundle, Buckets((settings.max_batch,), settings.lengths))
        if settings.packed:
            load_packed(self.customers, settings.packed)
        self._store: CustomerStore | None = None
        if settings.customers:
            self._store = CustomerStore(self.customers, settings.customers, poll=settings.poll)
            self._store.start()

    def close(self) -> None:
        """Watch the folder no more."""
        if self._store is not None:
            self._store.close()

    async def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request, an error for one that cannot be answered; the others do not suffer from it."""
        asked = [self._asked(request) for request in requests]
        batches = self._batches.make([(one.rows, one.numbers) for one in asked])
        await asyncio.gather(*(self._run(batch, asked) for batch in batches))
        return [self._response(request, one) for request, one in zip(requests, asked, strict=True)]

    def _asked(self, request: Any) -> _Asked:
        try:
            texts = {name: self._texts(request, name) for name in front_inputs(self.bundle.manifest)}
            rows = texts[TEXT]
            if not rows:
                raise MalformedInputError(f"the request holds no texts; give the input {TEXT}")
            customers = self._customers(request, texts[CUSTOMER], len(rows))
            pairs = texts.get(PAIR)
            if pairs is None and self.task.needs_pairs:
                raise MalformedInputError(f"this model scores pairs of texts; give the input {PAIR} too")
            numbers, versions = self.customers.rows(customers)
            by_input = {name: numbers[table] for name, table in TABLE_OF.items() if table in numbers}
            return _Asked(self._tokenizer.rows(rows, pairs, customers), by_input, versions)
        except QrloraError as error:
            return _Asked(error=error)

    def _texts(self, request: Any, name: str) -> list[str] | None:
        tensor = self._backend.get_input_tensor_by_name(request, name)
        return None if tensor is None else texts_of(tensor.as_numpy(), name)

    def _customers(self, request: Any, named: list[str] | None, rows: int) -> list[str | None]:
        """The customer of each row, by the input or for all rows by the request's parameter."""
        if named is not None:
            return owners(named, rows)
        name = json.loads(request.parameters() or "{}").get(CUSTOMER)
        if name is not None and not isinstance(name, str):
            raise MalformedInputError(f"the parameter {CUSTOMER} must be a text")
        return [name or None] * rows

    async def _run(self, batch: Batch, asked: Sequence[_Asked]) -> None:
        """Have the graph's model run a batch, and hand its rows back to their requests."""
        backend, answer = self._backend, self.task.output_name
        request = backend.InferenceRequest(
            model_name=self.settings.graph,
            requested_output_names=[answer],
            inputs=[backend.Tensor(name, array) for name, array in batch.inputs.items()],
            preferred_memory=backend.PreferredMemory(backend.TRITONSERVER_MEMORY_CPU, 0),
        )
        reason = ""
        try:
            response = await request.async_exec()
            if response.has_error():
                reason = response.error().message()
        # The backend's exceptions are in Triton's process alone; it raises one where the graph's model is not loaded.
        except Exception as error:
            reason = first_line(error)
        if reason:
            for one, _ in batch.places:
                asked[one].error = GraphError(f"{self.settings.graph}: {reason}")
            return
        logits = backend.get_output_tensor_by_name(response, answer).as_numpy()
        for number, (one, row) in enumerate(batch.places):
            found, version = asked[one].rows[row], asked[one].versions[row]
            own = version.answering.own(self._batches.own_tokens(logits[number], batch, found.length))
            asked[one].answers[row] = RowAnswer(
                own, version.answering.labels, version.digest, version.answering.thresholds, found.words
            )

    def _response(self, request: Any, asked: _Asked) -> Any:
        backend = self._backend
        if asked.error is not None:
            return backend.InferenceResponse(output_tensors=[], error=self._triton_error(asked.error))
        answers = [asked.answers[row] for row in range(len(asked.rows))]
        names = request.requested_output_names()
        return backend.InferenceResponse(
            output_tensors=[backend.Tensor(name, output_array(name, answers, self.task)) for name in names]
        )

    def _triton_error(self, error: QrloraError) -> Any:
        """What a client may see: paths of this machine are none of its business."""
        code = getattr(self._backend.TritonError, CODES.get(error.kind, "INTERNAL"))
        if error.kind == "unknown_customer":
            return self._backend.TritonError(UNKNOWN, code)
        if error.kind in CODES or isinstance(error, GraphError):
            return self._backend.TritonError(str(error), code)
        logger.warning("a request failed: %s", error)
        return self._backend.TritonError(UNUSABLE, code)
