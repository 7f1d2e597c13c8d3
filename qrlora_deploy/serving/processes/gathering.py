"""Metrics of all processes together: fronts tell what they counted, engines are asked when somebody wants to know."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qrlora_deploy.serving.engine.protocol import EngineStats, sum_of
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.processes.children import Child
from qrlora_deploy.serving.processes.control import Order
from qrlora_deploy.serving.processes.links import BrokenFrameError, record_of
from qrlora_deploy.serving.processes.messages import unpack_stats
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


@dataclass(frozen=True)
class _Model:
    name: str
    engine: Any


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
        self._metrics = Metrics(_Values(self._models), counted)
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._scrapes: set[asyncio.Task[None]] = set()

    def received(self, child: Child, kind: int, number: int, payload: bytearray) -> None:
        """A frame of a process."""
        if kind == Order.COUNTED:
            for counted in record_of(payload):
                self._metrics.observe(*counted)
        elif kind == Order.STATE:
            waiting = self._asked.get(number)
            if waiting is not None and not waiting.done():
                waiting.set_result(record_of(payload))
        elif kind == Order.SCRAPE:
            scrape = asyncio.create_task(self._scrape(child, number))
            self._scrapes.add(scrape)
            scrape.add_done_callback(self._scrapes.discard)
        else:
            raise BrokenFrameError(f"a process sends no frames of the kind {kind}")

    async def _scrape(self, child: Child, number: int) -> None:
        states = await asyncio.gather(*(self._state(it) for it in self.children if it.was_ready))
        for model in self._models.values():
            model.engine.told = []
        for state in states:
            for name, record in (state or {}).items():
                model = self._models.setdefault(name, _Model(name, _Known()))
                model.engine.told.append(unpack_stats(record))
        child.tell(Order.SCRAPED, number, self._metrics.text())

    async def _state(self, child: Child) -> Any:
        """What a process says of itself; what it has counted comes before. None: it does not answer."""
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        child.tell(Order.ASK_STATE, number)
        try:
            async with asyncio.timeout(PATIENCE_S):
                state = await self._asked[number]
        except TimeoutError:
            return None
        finally:
            del self._asked[number]
        return state if child.options.role == ENGINE else None


class _Values:
    """The models as they are known at the moment."""

    def __init__(self, models: dict[str, _Model]) -> None:
        self._models = models

    def __iter__(self) -> Any:
        return iter(list(self._models.values()))
