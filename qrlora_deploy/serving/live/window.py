"""The last minutes of a server: its totals are looked at every two seconds, and what matters is the difference."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.live.spans import Moment, Numbers, Span
from qrlora_deploy.serving.live.totals import RequestTotals

STEP_S = 2.0
"""Between two looks."""

STEPS = 150
"""Whose numbers are kept: five minutes."""

RECENT_STEPS = 30
"""Of what is told as "now": the last minute. So many totals are kept, some 0.5 MB a model."""

Requests = Callable[[], RequestTotals]
"""Totals of all fronts; where those are several processes, their sum."""

Engines = Callable[[], Mapping[str, EngineStats]]
"""Counters by model; where several engines answer for one, their sum."""


class Window:
    """Keeps the last minutes. For one event loop.

    Args:
        requests: asked at every look.
        engines: asked at every look.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(self, requests: Requests, engines: Engines, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests, self._engines, self._clock = requests, engines, clock
        self._recent: deque[Moment] = deque(maxlen=RECENT_STEPS + 1)
        self._steps: deque[tuple[float, Numbers]] = deque(maxlen=STEPS)

    def look(self) -> None:
        """Remember this moment; nothing where somebody has looked a short while ago."""
        now = self._clock()
        if self._recent and now - self._recent[-1].time_s < STEP_S / 2:
            return
        try:
            moment = Moment(now, self._requests(), dict(self._engines()))
        except QrloraError:
            # An engine that is being started again has nothing to tell; the next look makes up for it.
            return
        if self._recent:
            self._steps.append((now, Span.between(self._recent[-1], moment).numbers()))
        self._recent.append(moment)

    async def follow(self) -> None:
        """Look again and again, until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(STEP_S)

    async def ask(self) -> dict[str, Any]:
        """The same as `numbers`, for who asks over a network."""
        return self.numbers()

    def numbers(self) -> dict[str, Any]:
        """What the page shows, for JSON. It names models and reasons, and never a customer.

        Returns:
            `step_s`; `seconds`, which `now`, `refused` and `models` are about: the last minute or what there is of it;
            `now`, the numbers of `Span.numbers`; `refused`, requests by reason; `models`, numbers by name;
            `history`, for each step that is kept the same numbers as `now`, in lists, the oldest first, and the step's
            age in seconds as `age_s`. All but `step_s` is empty at the start.
        """
        self.look()
        if len(self._recent) < 2:
            return {"step_s": STEP_S, "seconds": 0.0, "now": {}, "refused": {}, "models": {}, "history": {}}
        span = Span.between(self._recent[0], self._recent[-1])
        return {
            "step_s": STEP_S,
            "seconds": round(span.seconds, 2),
            "now": span.numbers(),
            "refused": dict(sorted(span.requests.refused.items())),
            "models": span.model_numbers(),
            "history": self._history(),
        }

    def _history(self) -> dict[str, list[float | None]]:
        now = self._clock()
        steps = [{"age_s": round(now - time_s, 2), **numbers} for time_s, numbers in self._steps]
        return {name: [step[name] for step in steps] for name in steps[0]}
