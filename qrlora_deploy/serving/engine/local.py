"""The engine within this process: requests wait in a room, and threads run batches of them in turn."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from qrlora_deploy.errors import MalformedInputError, QrloraError
from qrlora_deploy.serving.engine.admission import Place, place_of, rows_by_customer
from qrlora_deploy.serving.engine.batching import Shapes
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.loading import Loading
from qrlora_deploy.serving.engine.models import Model
from qrlora_deploy.serving.engine.pace import Pace
from qrlora_deploy.serving.engine.protocol import EngineStats, Ticket
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.engine.requests import Request
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer
from qrlora_deploy.serving.engine.running import BatchRunner, as_ours, loaders_of
from qrlora_deploy.serving.engine.waiting_room import CLOSED, WaitingRoom
from qrlora_deploy.serving.refusals import DrainingError

LOG = logging.getLogger(__name__)

THREADS = 2
"""One prepares a batch, or tells answers, while the other's runs."""


class LocalEngine:
    """Answers rows of any customers in batches, which run one after the other. Safe for many threads.

    Rows wait by customer and are taken in fair order (`FairQueue`); those that are taken together are sorted by
    length and cut into batches (`cut`). Customers who are not in the table are fetched before their rows are
    queued (`Loading`), so one who is unknown fails its own request alone.

    Args:
        model: a `SwitchableSession` or a `MergedModel`.
        limits: the bounds; None: the usual ones.
        quotas: rows a second by customer; None: as many as they like.
        clock: seconds, as `time.monotonic`.

    Attributes:
        manifest: of the bundle that is served.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits | None = None,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manifest = model.manifest
        self._model = model
        limits, pace = limits or Limits(), Pace(clock)
        shapes = Shapes.of(limits, model.buckets)
        self._runner = BatchRunner(model, shapes, pace, clock)
        self._room = WaitingRoom(limits, quotas or Quotas(), shapes, pace, clock)
        self._loading = Loading(lambda name: model.bring([name]), loaders_of(model), self._loaded)
        self._threads = [threading.Thread(target=self._serve, name="engine", daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_room(self) -> None:
        """As `Engine.check_room`."""
        self._room.check_room()

    def admit(self, load: Load, customers: Sequence[str | None], deadline_s: float | None = None) -> Place:
        """As `Engine.admit`."""
        return self._room.reserve(load, customers, deadline_s)

    def release(self, ticket: Ticket) -> None:
        """As `Engine.release`; a request that was given to `submit` keeps its place until it ends."""
        self._room.give_back(place_of(ticket))

    def submit(self, ticket: Ticket, rows: Sequence[Row]) -> "Future[list[RowAnswer]]":
        """As `Engine.submit`.

        Raises:
            InputError: the ticket was used or released before.
        """
        request = self._room.enter(place_of(ticket), rows)
        try:
            self._check(request)
            missing = self._model.lacks(list(request.place.customers))
            if missing:
                self._loading.add(request, missing)
            else:
                self._room.enqueue(request)
        except Exception as error:
            self._room.end([(request, as_ours(error))])
        return request.future

    def stats(self) -> EngineStats:
        """As `Engine.stats`."""
        runner = self._runner
        return replace(
            self._room.stats(),
            batches=runner.batches,
            queue_s=runner.queue_s,
            queue_counts=tuple(runner.queued.counts),
            run_s=runner.run_s,
            run_tokens=runner.tokens,
            padded_tokens=runner.padded_tokens,
            last_run_s=runner.last_run_s,
            running=runner.running,
            resident=len(self._model.table),
            loads=self._model.table.loads,
            evictions=self._model.table.evictions,
        )

    def drain(self, timeout_s: float) -> bool:
        """As `Engine.drain`; requests that were admitted may still be given to `submit`."""
        return self._room.drain(timeout_s)

    def close(self) -> None:
        """As `Engine.close`; the batch that runs is answered."""
        self._room.close()
        self._loading.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._room.end_all(DrainingError(CLOSED))

    def _check(self, request: Request) -> None:
        """Make sure that the rows can run and are those that were admitted, and make them ready for the queue."""
        if rows_by_customer(row.customer for row in request.rows) != request.place.customers:
            raise MalformedInputError("the rows are not of the customers that their ticket is for")
        self._runner.collator.check(request.rows)
        request.wait()

    def _loaded(self, request: Request, error: QrloraError | None) -> None:
        """Queue a request whose customers are there, or end it."""
        try:
            if error is None:
                self._room.enqueue(request)
        except Exception as failure:
            error = as_ours(failure)
        if error is not None:
            self._room.end([(request, error)])

    def _serve(self) -> None:
        """A thread: batches until the engine is closed, whatever happens."""
        while True:
            try:
                batch = self._room.next_batch()
                if batch is None:
                    return
                try:
                    outcomes = self._runner.run(batch)
                finally:
                    self._room.ran()
                self._room.settle(outcomes)
            except BaseException as error:
                LOG.exception("the engine failed; every request that it held is refused")
                self._room.end_all(as_ours(error))
