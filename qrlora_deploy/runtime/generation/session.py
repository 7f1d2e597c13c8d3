"""Text for any customer in any row of a running batch."""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qrlora_deploy.errors import InputError, NotReadyError, QrloraError, argument
from qrlora_deploy.runtime.bundle.bundle import Bundle, check_graph, open_bundle
from qrlora_deploy.runtime.customers.events import Report
from qrlora_deploy.runtime.customers.store import CustomerStore
from qrlora_deploy.runtime.generation.budget import Budget, row_capacities, without_small
from qrlora_deploy.runtime.generation.choosing import Chooser
from qrlora_deploy.runtime.generation.engine import Engine, Running
from qrlora_deploy.runtime.generation.holding import Holder
from qrlora_deploy.runtime.generation.machines import machine_of
from qrlora_deploy.runtime.generation.placement import batch_buckets
from qrlora_deploy.runtime.generation.prefixes import PrefixCache
from qrlora_deploy.runtime.generation.prompts import PromptReader, check_room
from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationEvent, GenerationRequest
from qrlora_deploy.runtime.generation.scheduler import Scheduler
from qrlora_deploy.runtime.generation.streams import AnswerStream
from qrlora_deploy.runtime.generation.writing import Writer
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.loaded_customers import LoadedCustomers
from qrlora_deploy.runtime.sessions.shared import shared_session
from qrlora_deploy.tasks.registry import BY_NAME

STEP_TOKENS = 512
"""Tokens of prompts that are read between two tokens of running answers, or one block where that is more."""

PREFIX_SHARE = 4
"""Of the caches' memory, one part in so many may hold beginnings of prompts."""


class GenerationSession:
    """A decoder's bundle, open, and the answers that it writes. Safe for many threads.

    Answers are written side by side: a request takes a row of the running batch when one is free and leaves it when
    its answer ends. Whoever waits for an event does the work, for everybody; there is no thread of its own.

    Use `open`, or give a bundle that is open.

    Args:
        bundle: of the task text-generation.
        provider: "cpu", "cuda", "cuda:1" or a `Device` with options of its own; caches and the table of customers lie
            there. GPUs take bundles in fp16 and bf16.
        max_rows: answers that are written at the same time.
        max_cache_bytes: memory for keys and values.
        batches: sizes of a batch, with `max_rows`; a batch is filled up to the next one. With one size alone, an
            answer is the same to the last bit whatever runs beside it. None: the powers of two.
        capacities: tokens that a row may hold; rows of one capacity run together. None: 256, 1,024 and so on, up to
            the model's context, without those that are smaller than there is memory for with all rows.
        max_waiting: requests that wait for a row at most.
        customer_rows: rows of the coefficient table at most; None: no bound.
        block_tokens: a prompt is read in blocks of so many tokens, and the blocks of its beginning are kept for later
            prompts of the same customer that begin alike. None: 128, on a GPU 512.
        prefix_bytes: memory of these blocks, of that of the caches; 0 keeps none, None a quarter.
        threads: threads within an operator, and for rows that draw; None leaves the choice to ONNX Runtime, and takes
            all processors to draw.
        cuda_graphs: on a GPU, runs that write tokens are captured, a graph for each size of batch of each capacity when
            it comes for the first time, and replayed. False: every run as it comes.

    Attributes:
        customers: of a switchable bundle; `customers.load` makes a coefficients file live. None: it is merged.
        store: the folder of customers, where one was given to `open`.
        longest: tokens of a prompt with its answer.
        max_rows: as given.
        vocabulary: ids from 0 on that the model knows.

    Raises:
        InputError: the bundle is for another task, or in a precision that the device does not compute in, or a size
            makes no sense.
        ProviderError: the provider does not load.
        QrloraError: the table of customers, or a batch's logits, do not fit the device.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str | Device = "cpu",
        max_rows: int = 8,
        max_cache_bytes: int = 2**30,
        batches: Sequence[int] | None = None,
        capacities: Sequence[int] | None = None,
        max_waiting: int = 1024,
        customer_rows: int | None = None,
        block_tokens: int | None = None,
        prefix_bytes: int | None = None,
        threads: int | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        manifest = bundle.manifest
        check_bundle(bundle)
        machine = machine_of(Device.of(provider), bundle, cuda_graphs)
        buckets = batch_buckets(max_rows, batches)
        opened = shared_session(bundle, bundle.model, machine.device, threads, machine.captured)
        check_graph(opened, bundle)
        block = machine.block_tokens if block_tokens is None else block_tokens
        graph = machine.graph(opened, max_rows, block)
        self.bundle = bundle
        self.longest, self.max_rows = manifest.max_length, max_rows
        self.vocabulary = graph.vocabulary
        self.customers = LoadedCustomers(bundle, provider, max_rows=customer_rows) if graph.switchable else None
        self.store: CustomerStore | None = None
        self._prompts = PromptReader(bundle.folder, self.longest, graph.vocabulary)
        budget = Budget(max_cache_bytes)
        kept = max_cache_bytes // PREFIX_SHARE if prefix_bytes is None else prefix_bytes
        prefixes = PrefixCache(budget, kept, block)
        row_sizes = row_capacities(self.longest, capacities)
        if capacities is None:
            row_sizes = without_small(row_sizes, buckets[-1], graph.cache_shape.token_bytes(), budget.most)
        self._scheduler = Scheduler(
            row_sizes,
            buckets,
            budget,
            lambda capacity: machine.cache(graph.cache_shape, capacity),
            max_waiting,
            prefixes.free,
            machine.captured,
        )
        self._holder = Holder(self.customers, str(bundle.folder), manifest.coefficients_digest or "")
        self._chooser = Chooser(threads)
        self._engine = Engine(
            graph,
            self._scheduler,
            prefixes,
            self._holder,
            manifest.base_digest,
            block,
            max(STEP_TOKENS, block),
            chooser=self._chooser,
        )
        self._machine = machine
        self._window = 2 * max_rows
        self._stepping = threading.Lock()
        self._closed = False

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        customers: str | os.PathLike[str] | None = None,
        report: Report | None = None,
        **options: Any,
    ) -> "GenerationSession":
        """Open a bundle, and the folder of its customers.

        Args:
            bundle: its folder; or an open one.
            customers: a folder of coefficients files, `<customer>.safetensors`. Within `with` it is watched: a
                changed file goes live.
            report: told of customers that come and go.
            options: of `GenerationSession`.

        Raises:
            InputError: as the class; or the bundle is merged and takes no customers, or there is no such folder.
            FileFormatError: the bundle is damaged.
        """
        session = cls(bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle)), **options)
        if customers is not None:
            if session.customers is None:
                raise InputError(f"{session.bundle.folder} is a merged bundle and takes no {argument('customers')}")
            session.store = CustomerStore(session.customers, customers, report)
        return session

    def __enter__(self) -> "GenerationSession":
        if self.store is not None:
            self.store.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every answer as it is, and let go of the folder of customers."""
        with self._stepping:
            self._closed = True
            self._machine.call(lambda: self._engine.end_all("cancelled"))
            self._chooser.close()
        if self.store is not None:
            self.store.close()

    def submit(self, request: GenerationRequest, number: int = 0) -> AnswerStream:
        """Take a request; its events come while the stream is read.

        Args:
            request: what is asked.
            number: comes back with each event.

        Raises:
            MalformedInputError: the prompt is empty, too long or cannot be read.
            UnknownCustomerError: there is no such customer.
            InputError: the customer's file cannot be served.
            NotReadyError: the session is closed; or a `CacheFullError`: there is no room for it.
        """
        if self._closed:
            raise NotReadyError("the session is closed; open another one")
        prompt = self._prompts.read(request)
        max_tokens = check_room(prompt, request.max_tokens, self.longest)
        needed = len(prompt) + max_tokens
        self._scheduler.check(needed, len(self._engine.arrivals))
        self._holder.check(request.customer)
        reader = self._prompts
        ends = () if request.ignore_end else reader.ends
        writer = Writer(reader.tokenizer, prompt, ends, request.sampling, request.stop, max_tokens)
        deadline = None if request.timeout_s is None else self._engine.clock() + request.timeout_s
        running = Running(number, prompt, request.customer, needed, writer, deadline)
        self._engine.arrive(running)
        return AnswerStream(running, self._advance)

    @property
    def takes_chats(self) -> bool:
        """Whether messages can be a prompt: the bundle has a chat template."""
        return self._prompts.template is not None

    def read(self, request: GenerationRequest) -> list[int]:
        """The ids of a request's prompt, which may stand in for it.

        Raises:
            MalformedInputError: as `submit`.
        """
        return self._prompts.read(request)

    def text_of(self, token: int) -> str:
        """What the tokenizer shows of one token; U+FFFD stands where it is a part of a character."""
        return self._prompts.text_of(token)

    def check_customer(self, customer: str | None) -> None:
        """Make sure that a customer is there.

        Raises:
            UnknownCustomerError: it is not.
            InputError: its file cannot be served.
        """
        self._holder.check(customer)

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[GenerationEvent]:
        """The events of many requests, as they happen; they are taken as rows become free.

        A request that is refused gets an answer with its `error`; the others go on.
        """
        streams: list[AnswerStream] = []
        coming = enumerate(requests)
        try:
            while True:
                while len(streams) < self._window and (found := next(coming, None)) is not None:
                    number, request = found
                    try:
                        streams.append(self.submit(request, number))
                    except QrloraError as error:
                        yield GenerationEvent(number, answer=self._refusal(request, error))
                if not streams:
                    return
                yield from self._events(streams)
        finally:
            for stream in streams:
                stream.cancel()

    def answers(self, requests: Iterable[GenerationRequest]) -> list[GenerationAnswer]:
        """The answers of many requests, in their order."""
        found = {event.number: event.answer for event in self.generate(requests) if event.answer is not None}
        return [found[number] for number in range(len(found))]

    def _events(self, streams: list[AnswerStream]) -> Iterator[GenerationEvent]:
        """What has happened by the next step, without the streams that have ended."""
        streams[0].wait()
        for stream in list(streams):
            yield from stream.ready()
            if stream.ended:
                streams.remove(stream)

    def _refusal(self, request: GenerationRequest, error: QrloraError) -> GenerationAnswer:
        return GenerationAnswer("", (), "error", request.customer, self.bundle.manifest.base_digest, error=error)

    def _advance(self, running: Running) -> None:
        """Do a step unless another thread has brought what is waited for."""
        with self._stepping:
            if not running.events:
                self._machine.call(self._engine.step)


def check_bundle(bundle: Bundle) -> None:
    """Make sure that a bundle writes text.

    Raises:
        InputError: it is for another task.
    """
    task = BY_NAME[bundle.manifest.task]
    if not task.writes_text:
        raise InputError(f"{bundle.folder} is for {task.name} and writes no text; ask it by `predict`")
