"""The engines of all replicas together, as metrics ask for those of one process."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.live.window import STEP_S, Requests, Window

PATIENCE_S = 5.0
"""For the replicas to tell their counters."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Engines:
    """Those of a model."""

    found: EngineStats

    def stats(self) -> EngineStats:
        """The sums."""
        return self.found


@dataclass(frozen=True)
class _Total:
    """A model in all replicas."""

    name: str
    engine: _Engines

    @property
    def ready(self) -> bool:
        """A replica answers for it that does not end."""
        return not self.engine.found.draining


class Totals:
    """Models with the sums of what their replicas have told last. A replica that ends takes its counts along."""

    def __init__(self) -> None:
        self._models: list[_Total] = []

    def __iter__(self) -> Iterator[_Total]:
        return iter(self._models)

    def stats(self) -> dict[str, EngineStats]:
        """The sums by the model's name."""
        return {model.name: model.engine.found for model in self._models}

    def take(self, replicas: Iterable[Mapping[str, EngineStats]]) -> None:
        """What each replica tells, by the model's name."""
        found: dict[str, EngineStats] = {}
        for replica in replicas:
            for model, stats in replica.items():
                found[model] = found.get(model, EngineStats()) + stats
        self._models = [_Total(name, _Engines(stats)) for name, stats in found.items()]


class ReplicasWindow:
    """The last minutes of a front and of the replicas behind it: `parts.LiveNumbers`. For one event loop.

    Args:
        requests: totals of the front.
        totals: are brought up to date before each look.
        ask: what each replica counts.
    """

    def __init__(
        self, requests: Requests, totals: Totals, ask: Callable[[], Awaitable[Sequence[Mapping[str, EngineStats]]]]
    ) -> None:
        self._totals, self._ask = totals, ask
        self._window = Window(requests, totals.stats)

    async def follow(self) -> None:
        """Look again and again, until it is cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(STEP_S)

    async def ask(self) -> dict[str, Any]:
        """As `Window.ask`."""
        await self._look()
        return await self._window.ask()

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                self._totals.take(await self._ask())
        # Replicas that cannot be asked now tell nothing new; the page shows what is known.
        except Exception as error:
            logger.debug("replicas tell no counters: %r", error)
        self._window.look()
