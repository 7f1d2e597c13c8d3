"""Where a server is between its start and its end; the fronts of every protocol look here."""

import threading
import time
from collections.abc import Callable, Mapping

from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.refusals import DrainingError


class Life:
    """From starting over ready to draining. Safe for many threads.

    Args:
        hangs: whether what runs does not go on.

    Attributes:
        draining: the end has begun. Requests are still answered for a while, but connections are not kept.
    """

    def __init__(self, hangs: Callable[[], bool] = lambda: False) -> None:
        self._hangs, self._begun = hangs, False
        self.draining = False

    @property
    def live(self) -> bool:
        """It goes on; whoever runs the process should end it otherwise."""
        return not self._hangs()

    @property
    def ready(self) -> bool:
        """Requests are welcome; a load balancer may send them."""
        return self._begun and not self.draining and self.live

    @property
    def state(self) -> str:
        """ "starting", "ready" or "draining"."""
        return "draining" if self.draining else "ready" if self._begun else "starting"

    def begin(self) -> None:
        """Everything is loaded."""
        self._begun = True

    def drain(self) -> None:
        """The end begins."""
        self.draining = True

    def check(self) -> None:
        """Make sure that requests can be answered: while a server drains it still answers who has not heard of it.

        Raises:
            DrainingError: it is not ready yet.
        """
        if not (self._begun or self.draining):
            raise DrainingError("the server is not ready yet; try again soon")


class Hanging:
    """Sees a run that does not end, where it is asked again and again. Safe for many threads.

    Args:
        engines: counters by model.
        hang_s: that a run may take; 0: as long as it likes.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        engines: Callable[[], Mapping[str, EngineStats]],
        hang_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines, self._hang_s, self._clock = engines, hang_s, clock
        self._lock = threading.Lock()
        self._since: dict[str, tuple[int, float]] = {}

    def found(self) -> bool:
        """Whether the run that is under way was so when this was asked `hang_s` ago."""
        if not self._hang_s:
            return False
        now = self._clock()
        with self._lock:
            for name, stats in self._engines().items():
                if stats.running != self._since.get(name, (0, 0.0))[0]:
                    self._since[name] = stats.running, now
            return any(run and now - since_s >= self._hang_s for run, since_s in self._since.values())
