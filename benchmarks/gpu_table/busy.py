"""A session kept busy by threads, and swaps beside it at a fixed rate."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime import SwitchableSession

Inputs = dict[str, np.ndarray]


class Busy:
    """Threads that predict batches one after the other, from `with` to its end.

    Args:
        session: to keep busy.
        inputs: of every batch.
        choose: the customers of the next batch; called by every thread.
        threads: two, so that the next batch waits when one ends.
    """

    def __init__(self, session: SwitchableSession, inputs: Inputs, choose: Callable[[], list[str]], threads: int = 2):
        self.done: list[float] = []
        self._session, self._inputs, self._choose = session, inputs, choose
        self._stop = threading.Event()
        self._errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._predict, daemon=True) for _ in range(threads)]

    def __enter__(self) -> "Busy":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def rate(self, start: float, stop: float) -> float:
        """Batches per second, from the first that ended in a window to the last."""
        ends = sorted(moment for moment in self.done if start <= moment < stop)
        if len(ends) < 3:
            raise SystemExit(f"only {len(ends)} batches ended in {stop - start:.1f} s; give a longer --window")
        return (len(ends) - 1) / (ends[-1] - ends[0])

    def _predict(self) -> None:
        try:
            while not self._stop.is_set():
                self._session.predict(self._inputs, self._choose())
                self.done.append(time.perf_counter())
        except Exception as error:
            self._errors.append(error)


@dataclass
class Swapper:
    """Swaps customers at a fixed rate.

    Attributes:
        names, versions: swapped in turn.
        per_second: the rate; a swap that comes late is made at once, so that the rate is kept.
        samples: seconds that each took.
    """

    session: SwitchableSession
    names: list[str]
    versions: list[Coefficients]
    per_second: float
    samples: list[float] = field(default_factory=list)

    def swap(self) -> None:
        """Swap the next one."""
        number = len(self.samples)
        name, version = self.names[number % len(self.names)], self.versions[number % len(self.versions)]
        start = time.perf_counter()
        self.session.load(name, version)
        self.samples.append(time.perf_counter() - start)

    def run(self, seconds: float, together: int = 1) -> None:
        """Swap for so long, so many at a time; the rate is that of all."""
        begin = time.perf_counter()
        count = int(seconds * self.per_second)
        for turn in range(0, count, together):
            wait = begin + turn / self.per_second - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            for _ in range(together):
                self.swap()
            if time.perf_counter() - begin > 2 * seconds:
                raise SystemExit(f"{self.per_second:.0f} swaps a second are more than this machine can do")


def rates_beside_swaps(busy: Busy, swapper: Swapper, windows: int, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Batches per second in windows without and with swaps, which take turns: `[windows]` each."""
    rates: tuple[list[float], list[float]] = ([], [])
    for window in range(2 * windows):
        # Which comes first changes, so that a drift favours neither.
        swaps = window % 4 in (1, 2)
        start = time.perf_counter()
        if swaps:
            swapper.run(seconds)
        else:
            time.sleep(seconds)
        rates[swaps].append(busy.rate(start, time.perf_counter()))
    return np.array(rates[0]), np.array(rates[1])
