"""Open-loop load: requests arrive at their own times, whether the server keeps up or not.

Latency is counted from the scheduled arrival, so the wait behind a slow answer is in it ("coordinated
omission" would leave it out). The schedule is Poisson, from a seed, as that of MLPerf's scenario
server. MLCommons' loadgen itself was tried (6.0) and not taken: it ends the process when an answer
raises, cannot stop a run whose queue grows, writes four files per run and gives the latencies that we
keep only through its trace file.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.bench.statistics import Estimate, needed_samples, percentile
from qrlora_deploy.bench.subjects import Call

GIVE_UP = 10
"""A request that has waited for so many budgets ends a run: the queue grows."""

SHARE = 0.99


@dataclass(frozen=True)
class Served:
    """A run.

    Attributes:
        rate_per_s: requests that arrived per second, as planned.
        latencies_s: of the answered ones in order of arrival, from the scheduled arrival to the answer.
        saturated: it was cut off.
    """

    rate_per_s: float
    latencies_s: list[float]
    saturated: bool

    @property
    def p99(self) -> Estimate | None:
        """In seconds; None with too few samples or a run that was cut off."""
        return None if self.saturated else percentile(np.array(self.latencies_s), SHARE)

    def within(self, budget_s: float) -> bool:
        """Whether the p99 is known and stays within the budget."""
        found = self.p99
        return found is not None and found.value <= budget_s


def poisson_arrivals(rate_per_s: float, count: int, random: np.random.Generator) -> np.ndarray:
    """`[count]` seconds after the start at which requests arrive."""
    return np.cumsum(random.exponential(1 / rate_per_s, count))


def offer(call: Call, arrivals_s: np.ndarray, workers: int, give_up_s: float) -> tuple[list[float], bool]:
    """Answer requests at their times by `workers` threads; each takes the next one when it is free.

    Returns:
        Latencies in seconds in order of arrival, and whether the run was cut off because one had
        waited for longer than `give_up_s`.

    Raises:
        Exception: what `call` raises.
    """
    latencies = np.full(len(arrivals_s), np.nan)
    turns, lock = iter(range(len(arrivals_s))), threading.Lock()
    stop, errors = threading.Event(), []
    start = time.perf_counter()

    def work() -> None:
        try:
            for turn in _shared(turns, lock):
                due = start + arrivals_s[turn]
                early = due - time.perf_counter()
                if early > 0:
                    time.sleep(early)
                if -early > give_up_s:
                    stop.set()
                if stop.is_set():
                    return
                call(turn)
                latencies[turn] = time.perf_counter() - due
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, name=f"load-{index}") for index in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [float(value) for value in latencies[~np.isnan(latencies)]], stop.is_set()


def _shared(turns: Iterator[int], lock: threading.Lock) -> Iterator[int]:
    """The turns that this thread gets of all."""
    while True:
        with lock:
            turn = next(turns, None)
        if turn is None:
            return
        yield turn


class RateSearch:
    """The largest rate with its p99 within the budget, by halving.

    Args:
        capacity_per_s: what back-to-back runs would answer; never tried, since a queue would grow.
        runs: rates that are tried.

    Attributes:
        bounded: a higher rate failed.
        refused: requests that the percentile needs, where a run had time for fewer; then the search ends.
    """

    def __init__(self, capacity_per_s: float, budget_s: float, runs: int) -> None:
        self.budget_s, self.left = budget_s, runs
        self._low, self._high = 0.0, capacity_per_s
        self.bounded, self.refused = False, 0

    @property
    def rate_per_s(self) -> float | None:
        """The largest rate that stayed within the budget so far."""
        return self._low or None

    def next_rate(self) -> float | None:
        """The rate to try; None at the end."""
        return (self._low + self._high) / 2 if self.left else None

    def tell(self, served: Served) -> None:
        """What came of it."""
        self.left -= 1
        if served.within(self.budget_s):
            self._low = served.rate_per_s
        elif served.p99 is None and not served.saturated:
            self.left, self.refused = 0, needed_samples(SHARE)
        else:
            self._high, self.bounded = served.rate_per_s, True


def arrivals_for(rate_per_s: float, seconds: float) -> int:
    """Requests of a run: as many as its percentile needs, or what fits `seconds` where that is fewer."""
    return max(1, min(needed_samples(SHARE), int(rate_per_s * seconds)))
