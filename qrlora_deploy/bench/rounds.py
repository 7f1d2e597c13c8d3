"""Closed-loop measurement of several subjects in turn: rounds, windows, and when it is enough.

In a round every subject has its turn, in a random order, so that whatever slows the machine down
meets all of them alike. A turn begins with a rest: ONNX Runtime's threads go on spinning for some 25
ms after a run, and two sessions that follow each other closely on two cores take two to three times
as long as each alone. Then comes a run that is not measured, since the weights of the subject before
fill the caches, and then those that are.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from qrlora_deploy.bench.statistics import Stability, stability
from qrlora_deploy.bench.subjects import Call

WARMUP_RUNS = 5
MIN_WINDOW, WINDOWS = 5, 10
"""A window is a tenth of what fits the time, and never less than five rounds."""

BLOCK_S = 0.05
"""Back-to-back runs that give one sample of a throughput."""

TURN_S, MAX_RUNS = 0.03, 8
"""A turn measures single runs for about as long as its rest lasts, and no more of them than this."""

REST_STEP_S, MAX_REST_S = 0.002, 0.06
IDLE = 0.2
"""A rest is over when the process has used less than this share of a step."""


@dataclass(frozen=True)
class Bounds:
    """When a measurement ends: at the first window that is stable with enough samples, or out of time.

    Attributes:
        seconds: for all subjects together, warm-up included.
        samples: that many at least, of each subject.
    """

    seconds: float
    samples: int


@dataclass
class Series:
    """What was measured of one subject: seconds per run in `warmup`, any unit in the others."""

    warmup: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    windows: list[float] = field(default_factory=list)

    @property
    def stability(self) -> Stability:
        """Of the windows."""
        return stability(self.windows)

    def close_window(self, count: int) -> None:
        """Take the last samples as a window."""
        self.windows.append(float(np.median(self.samples[-count:])))


Sampler = Callable[[Call, int], list[float]]
"""What a turn gives, from a call and the number of the round."""

Tick = Callable[[float], None]
"""Told the share of a measurement that is done."""


def measure_latency(
    calls: Mapping[str, Call], bounds: Bounds, random: np.random.Generator, tick: Tick | None = None
) -> dict[str, Series]:
    """Seconds of single runs; the same number of each subject in a round."""
    started, warmups = time.perf_counter(), {name: warm_up(call) for name, call in calls.items()}
    slowest = max(float(np.median(warmup)) for warmup in warmups.values())
    runs = int(np.clip(TURN_S / slowest, 1, MAX_RUNS))

    def sample(call: Call, turn: int) -> list[float]:
        return [seconds_of(call, turn * runs + step) for step in range(runs)]

    measured = {name: Series(warmup=warmup) for name, warmup in warmups.items()}
    _measure(measured, calls, dict.fromkeys(calls, sample), _Run(bounds, started, random, tick))
    return measured


def measure_throughput(
    calls: Mapping[str, Call], rows: int, bounds: Bounds, random: np.random.Generator, tick: Tick | None = None
) -> dict[str, Series]:
    """Rows per second of back-to-back runs, a block of them in every turn."""

    def sampler(median: float) -> Sampler:
        runs = max(1, math.ceil(BLOCK_S / median))

        def sample(call: Call, turn: int) -> list[float]:
            start = time.perf_counter()
            for step in range(runs):
                call(turn + step)
            return [rows * runs / (time.perf_counter() - start)]

        return sample

    started = time.perf_counter()
    measured = {name: Series(warmup=warm_up(call)) for name, call in calls.items()}
    samplers = {name: sampler(float(np.median(series.warmup))) for name, series in measured.items()}
    _measure(measured, calls, samplers, _Run(bounds, started, random, tick))
    return measured


def measure_in_turn(
    calls: Mapping[str, Call],
    samplers: Mapping[str, Sampler],
    bounds: Bounds,
    random: np.random.Generator,
    tick: Tick | None = None,
) -> dict[str, Series]:
    """Whatever the samplers give; `calls` are the runs that are not measured."""
    started = time.perf_counter()
    measured = {name: Series(warmup=warm_up(call)) for name, call in calls.items()}
    _measure(measured, calls, samplers, _Run(bounds, started, random, tick))
    return measured


def rest() -> None:
    """Sleep until the threads of the run before have stopped spinning."""
    for _ in range(int(MAX_REST_S / REST_STEP_S)):
        before = time.process_time()
        time.sleep(REST_STEP_S)
        if time.process_time() - before < IDLE * REST_STEP_S:
            return


def warm_up(call: Call) -> list[float]:
    """Seconds of the first runs in a shape: memory is taken and kernels are chosen there."""
    rest()
    return [seconds_of(call, turn) for turn in range(WARMUP_RUNS)]


def seconds_of(call: Call, turn: int) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    call(turn)
    return time.perf_counter() - start


@dataclass(frozen=True)
class _Run:
    """A measurement's bounds, when its warm-up began, its random order, and who is told."""

    bounds: Bounds
    started: float
    random: np.random.Generator
    tick: Tick | None


def _measure(
    measured: dict[str, Series], calls: Mapping[str, Call], samplers: Mapping[str, Sampler], run: _Run
) -> None:
    """Add samples and windows to what was `measured`, until that is enough."""
    bounds = run.bounds
    first, window, rounds = time.perf_counter(), MIN_WINDOW, 0
    while True:
        for name in run.random.permutation(list(calls)):
            rest()
            calls[name](rounds)
            measured[name].samples += samplers[name](calls[name], rounds)
        rounds += 1
        now = time.perf_counter()
        if rounds == MIN_WINDOW:
            window = max(MIN_WINDOW, int(bounds.seconds / WINDOWS / (now - first) * rounds))
        if rounds % window == 0:
            for series in measured.values():
                series.close_window(window * len(series.samples) // rounds)
            enough = all(
                series.stability.stable and len(series.samples) >= bounds.samples for series in measured.values()
            )
            if enough:
                return
        if run.tick is not None:
            run.tick(min(1.0, (now - run.started) / bounds.seconds))
        if now - run.started >= bounds.seconds:
            return
