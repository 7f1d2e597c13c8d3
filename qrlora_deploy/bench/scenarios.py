"""The scenarios: each takes open subjects and gives measurements."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.bench.measurements import make_measurement, measurement_of
from qrlora_deploy.bench.report_parts import Capacity, Measurement
from qrlora_deploy.bench.rounds import Bounds, Tick, measure_latency, measure_throughput, seconds_of, warm_up
from qrlora_deploy.bench.serving_load import GIVE_UP, RateSearch, Served, arrivals_for, offer, poisson_arrivals
from qrlora_deploy.bench.settings import BenchSettings
from qrlora_deploy.bench.subjects import BundleSubject, Call, Subject, customer_file
from qrlora_deploy.bench.workload import Workload
from qrlora_deploy.io.threads import finish

OFFLINE_SAMPLES = 36
BUDGET_OF_MEDIAN = 5.0
"""Of the scenario server, where none is given: times the slowest subject's median of a run alone."""

SWAP_RUNS = 10
"""Runs with swaps, then as many without, and so on."""


@dataclass(frozen=True)
class Stage:
    """What every scenario works with."""

    settings: BenchSettings
    subjects: Mapping[str, Subject]
    random: np.random.Generator
    tick: Tick

    def calls(self, workload: Workload) -> dict[str, Call]:
        """Every subject made ready for a workload."""
        return {name: subject.prepare(workload) for name, subject in self.subjects.items()}


def run_single_stream(stage: Stage, workload: Workload) -> list[Measurement]:
    """One run after the other, each by itself."""
    bounds = Bounds(stage.settings.seconds, stage.settings.samples)
    measured = measure_latency(stage.calls(workload), bounds, stage.random, stage.tick)
    return [measurement_of(name, "single-stream", workload, series) for name, series in measured.items()]


def run_offline(stage: Stage, workload: Workload) -> list[Measurement]:
    """Runs back to back: rows per second."""
    bounds = Bounds(stage.settings.seconds, OFFLINE_SAMPLES)
    measured = measure_throughput(stage.calls(workload), workload.batch, bounds, stage.random, stage.tick)
    return [measurement_of(name, "offline", workload, series) for name, series in measured.items()]


def run_server(stage: Stage, workload: Workload) -> tuple[list[Measurement], list[Capacity]]:
    """Poisson arrivals at different rates; every request is one batch of the workload."""
    calls, settings = stage.calls(workload), stage.settings
    medians = {name: float(np.median(warm_up(call) + warm_up(call))) for name, call in calls.items()}
    given = settings.p99_budget_ms
    budget_s = given / 1e3 if given is not None else BUDGET_OF_MEDIAN * max(medians.values())
    searches = {
        name: RateSearch(settings.workers / median, budget_s, settings.server_runs) for name, median in medians.items()
    }
    found: list[Measurement] = []
    for step in range(settings.server_runs):
        for name in stage.random.permutation(list(calls)):
            rate = searches[name].next_rate()
            if rate is None:
                continue
            arrivals = poisson_arrivals(rate, arrivals_for(rate, settings.seconds), stage.random)
            latencies, cut = offer(calls[name], arrivals, settings.workers, GIVE_UP * budget_s)
            served = Served(rate, latencies, cut)
            searches[name].tell(served)
            found.append(_served(name, workload, served))
        stage.tick((step + 1) / settings.server_runs)
    capacities = [
        Capacity(
            subject=name,
            batch=workload.batch,
            length=workload.length,
            budget_ms=budget_s * 1e3,
            rate_per_s=search.rate_per_s,
            bounded=search.bounded,
            refused=search.refused,
        )
        for name, search in searches.items()
    ]
    return found, capacities


def _served(name: str, workload: Workload, served: Served) -> Measurement:
    latencies_ms = [seconds * 1e3 for seconds in served.latencies_s]
    made = make_measurement(name, "server", workload, latencies_ms, f"{served.rate_per_s:.4g}/s")
    update: dict[str, object] = {"offered_per_s": served.rate_per_s, "saturated": served.saturated}
    if served.saturated:
        # Of a run that was cut off while its queue grew, nothing would be true a second later.
        update |= {"percentiles": {}, "refused": {}}
    return made.model_copy(update=update)


def run_idle_gap(stage: Stage, workload: Workload) -> list[Measurement]:
    """The first run after a rest of the whole process."""
    calls, settings = stage.calls(workload), stage.settings
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        warm_up(call)
    for repeat in range(settings.repeats):
        for name in stage.random.permutation(list(calls)):
            calls[name](repeat)
            time.sleep(settings.idle_seconds)
            samples[name].append(1e3 * seconds_of(calls[name], repeat))
        stage.tick((repeat + 1) / settings.repeats)
    variant = f"after {settings.idle_seconds:g} s"
    return [make_measurement(name, "idle-gap", workload, values, variant) for name, values in samples.items()]


def run_swap(stage: Stage, workload: Workload) -> list[Measurement]:
    """Runs while customers are swapped beside them, and without; and the swaps, from their files."""
    found: list[Measurement] = []
    able = [subject for subject in stage.subjects.values() if isinstance(subject, BundleSubject) and subject.customers]
    for index, subject in enumerate(able):

        def tick(share: float, done: int = index) -> None:
            stage.tick((done + share) / len(able))

        found += _swap_beside(stage.settings, subject, workload, tick)
    return found


def _swap_beside(settings: BenchSettings, subject: BundleSubject, workload: Workload, tick: Tick) -> list[Measurement]:
    call = subject.prepare(workload)
    warm_up(call)
    session, swaps = subject.switchable, list[float]()
    if session is None:
        return []
    owners = [owner for owner in subject.owners(workload.batch) if owner is not None] or subject.customers[:1]
    files = [(owner, customer_file(subject.spec, owner)) for owner in dict.fromkeys(owners)]

    def swap(turn: int) -> None:
        start = time.perf_counter()
        session.load(*files[turn % len(files)])
        swaps.append(1e3 * (time.perf_counter() - start))

    samples: dict[str, list[float]] = {"no swaps": [], "with swaps": []}
    started, turn = time.perf_counter(), 0
    while len(samples["with swaps"]) < settings.samples and time.perf_counter() - started < settings.seconds:
        for variant, values in samples.items():
            with _Repeating(swap, settings.swaps_per_s if variant == "with swaps" else None):
                for _ in range(SWAP_RUNS):
                    values.append(1e3 * seconds_of(call, turn))
                    turn += 1
        tick(min(1.0, (time.perf_counter() - started) / settings.seconds))
    samples["swap"] = swaps
    name = subject.record.name
    return [make_measurement(name, "swap", workload, values, variant) for variant, values in samples.items() if values]


class _Repeating:
    """Calls `work` in a thread, first at once and then so many times a second, while it is entered.

    Args:
        work: gets the number of the call.
        per_s: None: never.

    Raises:
        BaseException: on leaving, what `work` raised.
    """

    def __init__(self, work: Callable[[int], None], per_s: float | None) -> None:
        self._work, self._per_s = work, per_s
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if self._per_s is not None:
            self._thread = threading.Thread(target=self._run, args=(self._per_s,), name="swaps")
            try:
                self._thread.start()
            except BaseException:
                # It may run all the same, and nobody leaves what was not entered.
                self._stop.set()
                raise

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            finish(self._thread.join)
        if self._errors:
            raise self._errors[0]

    def _run(self, per_s: float) -> None:
        try:
            turn = 0
            while not self._stop.is_set():
                self._work(turn)
                turn += 1
                self._stop.wait(1 / per_s)
        except BaseException as error:
            self._errors.append(error)


def smallest_batch(workloads: Sequence[Workload]) -> list[Workload]:
    """Those with the fewest rows, one per length: where answers are waited for."""
    least = min(workload.batch for workload in workloads)
    return [workload for workload in workloads if workload.batch == least]
