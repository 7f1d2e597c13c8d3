"""What all processes count, together: metrics, of which fronts tell what they counted, and the last minutes."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson

from qrlora_deploy.runtime.customers.objects.store import ObjectStoreStats
from qrlora_deploy.serving.engine.protocol import EngineStats, sum_of
from qrlora_deploy.serving.generation.counting import WriterStats
from qrlora_deploy.serving.live.totals import RequestTotals
from qrlora_deploy.serving.live.window import STEP_S, Window
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.processes.children import Child
from qrlora_deploy.serving.processes.control import Order
from qrlora_deploy.serving.processes.links import BrokenFrameError, record_of
from qrlora_deploy.serving.processes.messages import EngineState
from qrlora_deploy.serving.processes.options import ENGINE

PATIENCE_S = 1.0
"""For a process to tell its state: a scrape goes on without one that does not."""


class _Known:
    """An engine's counters as they were told last, in place of the engine."""

    def __init__(self) -> None:
        self.told: list[EngineStats] = []

    def stats(self) -> EngineStats:
        """Of all devices together."""
        return sum_of(self.told)


class _KnownWriter:
    """The same of what writes text."""

    def __init__(self) -> None:
        self.told = WriterStats()

    def written(self) -> WriterStats:
        """Of all devices together."""
        return self.told


@dataclass(frozen=True)
class _Model:
    name: str
    engine: Any
    writer: "_KnownWriter | None" = None


class Gathering:
    """Adds up what the processes of a server count. It belongs to one event loop.

    Args:
        counted: customers that are counted by name.

    Attributes:
        children: the processes.
    """

    def __init__(self, counted: Sequence[str] = ()) -> None:
        self.children: list[Child] = []
        self._models: dict[str, _Model] = {}
        self._stores: dict[str, Callable[[], ObjectStoreStats]] = {}
        self._metrics = Metrics(_Values(self._models), counted, self._stores)
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._engines: dict[Child, EngineState] = {}
        self._fronts: dict[Child, RequestTotals] = {}
        self._of_ended_engines: dict[str, EngineStats] = {}
        self._of_ended_writers: dict[str, WriterStats] = {}
        self._failures_of_ended: Counter[str] = Counter()
        self._of_ended_fronts = self._requests = RequestTotals()
        self._window = Window(lambda: self._requests, self._stats)

    def received(self, child: Child, kind: int, number: int, payload: bytearray) -> None:
        """A frame of a process."""
        if kind == Order.COUNTED:
            for counted in record_of(payload):
                self._metrics.observe(*counted)
        elif kind == Order.STATE:
            waiting = self._asked.get(number)
            if waiting is not None and not waiting.done():
                waiting.set_result(record_of(payload))
        elif kind in (Order.SCRAPE, Order.LOOK):
            answering = asyncio.create_task(self._answer(child, Order(kind), number))
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)
        else:
            raise BrokenFrameError(f"a process sends no frames of the kind {kind}")

    async def follow(self) -> None:
        """Keep the last minutes, until it is cancelled."""
        while True:
            await self._gather()
            self._window.look()
            await asyncio.sleep(STEP_S)

    async def _answer(self, child: Child, order: Order, number: int) -> None:
        await self._gather()
        if order == Order.SCRAPE:
            child.tell(Order.SCRAPED, number, self._metrics.text())
        else:
            child.tell(Order.SEEN, number, orjson.dumps(self._window.numbers()))

    async def _gather(self) -> None:
        """Ask all processes for what they have counted."""
        asked = [it for it in self.children if it.was_ready]
        states = await asyncio.gather(*map(self._state, asked))
        for child, state in zip(asked, states, strict=True):
            # One that does not answer in time has what it told before.
            if state and child.options.role == ENGINE:
                self._engines[child] = EngineState.of_record(state)
            elif state:
                self._fronts[child] = RequestTotals.of_record(state)
        self._keep_of_ended()
        self._requests = sum(self._fronts.values(), self._of_ended_fronts)
        self._sum_engines()
        self._sum_stores()

    def _keep_of_ended(self) -> None:
        """Add up what ended processes told last: a counter that falls would be taken for a server started anew."""
        for child in self._engines.keys() - set(self.children):
            state = self._engines.pop(child)
            for name, stats in state.engines.items():
                self._of_ended_engines[name] = self._of_ended_engines.get(name, EngineStats()) + stats.ended()
            for name, written in state.writers.items():
                self._of_ended_writers[name] = self._of_ended_writers.get(name, WriterStats()) + written.ended()
            self._failures_of_ended.update({name: store.failures for name, store in state.stores.items()})
        for child in self._fronts.keys() - set(self.children):
            self._of_ended_fronts += self._fronts.pop(child)

    def _sum_engines(self) -> None:
        told = {name: [stats] for name, stats in self._of_ended_engines.items()}
        for state in self._engines.values():
            for name, stats in state.engines.items():
                told.setdefault(name, []).append(stats)
        written = dict(self._of_ended_writers)
        for state in self._engines.values():
            for name, of_one in state.writers.items():
                written[name] = written.get(name, WriterStats()) + of_one
        for name, all_told in told.items():
            writer = _KnownWriter() if name in written else None
            model = self._models.setdefault(name, _Model(name, _Known(), writer))
            model.engine.told = all_told
            if model.writer is not None:
                model.writer.told = written[name]

    def _sum_stores(self) -> None:
        seen: dict[str, ObjectStoreStats] = {}
        for state in self._engines.values():
            for name, store in state.stores.items():
                seen[name] = seen[name] + store if name in seen else store
        for name, store in seen.items():
            whole = replace(store, failures=store.failures + self._failures_of_ended[name])
            # Of a store that no engine tells of at the moment the last is known.
            self._stores[name] = partial(_same, whole)

    def _stats(self) -> dict[str, EngineStats]:
        return {name: model.engine.stats() for name, model in self._models.items()}

    async def _state(self, child: Child) -> Any:
        """What a process says of itself; what it has counted comes before. None: it does not answer."""
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        child.tell(Order.ASK_STATE, number)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._asked[number]
        except TimeoutError:
            return None
        finally:
            del self._asked[number]


def _same(stats: ObjectStoreStats) -> ObjectStoreStats:
    return stats


class _Values:
    """The models as they are known at the moment."""

    def __init__(self, models: dict[str, _Model]) -> None:
        self._models = models

    def __iter__(self) -> Any:
        return iter(list(self._models.values()))
