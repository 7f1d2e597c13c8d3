"""The scenarios of decoders: batches of requests at once, and requests at random times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qrlora_deploy.bench.generation.load import Timeline, answer_load
from qrlora_deploy.bench.generation.subject import DecoderSubject
from qrlora_deploy.bench.measurements import make_measurement, percentiles_of
from qrlora_deploy.bench.report_parts import GOODPUT, ITL, TOKENS, TPOT, TTFT, Capacity, Measurement, Unit
from qrlora_deploy.bench.rounds import Bounds, Sampler, Series, measure_in_turn, warm_up
from qrlora_deploy.bench.scenarios import Stage
from qrlora_deploy.bench.serving_load import GIVE_UP, RateSearch, Served, arrivals_for, poisson_arrivals
from qrlora_deploy.bench.settings import BenchSettings
from qrlora_deploy.bench.statistics import PERCENTILES
from qrlora_deploy.bench.workload import Workload
from qrlora_deploy.errors import InputError, argument

UNITS: dict[str, Unit] = {TTFT: "ms", TPOT: "ms", ITL: "ms", TOKENS: "tokens/s", GOODPUT: "requests/s"}

WINDOWS = 10


@dataclass(frozen=True)
class Budgets:
    """What a user waits for, in milliseconds; None: no matter how long."""

    ttft_ms: float | None
    tpot_ms: float | None

    @property
    def given(self) -> bool:
        """Whether there is one."""
        return self.ttft_ms is not None or self.tpot_ms is not None

    def used(self, timeline: Timeline) -> float:
        """The larger share of a budget that an answer took: at most 1 is within both."""
        shares = ((timeline.ttft_s, self.ttft_ms), (timeline.tpot_s, self.tpot_ms))
        return max(1e3 * seconds / budget for seconds, budget in shares if budget is not None)


@dataclass
class _Seen:
    """All runs of one subject."""

    samples: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in UNITS})

    def add(self, timelines: Sequence[Timeline], budgets: Budgets) -> float:
        """Take one run; returns its tokens a second."""
        seconds = max(one.tokens[-1] for one in timelines) - min(one.due for one in timelines)
        for one in timelines:
            self.samples[TTFT].append(1e3 * one.ttft_s)
            if len(one.tokens) > 1:
                self.samples[TPOT].append(1e3 * one.tpot_s)
                self.samples[ITL] += [1e3 * between for between in one.itl_s]
        rate = sum(len(one.tokens) for one in timelines) / seconds
        self.samples[TOKENS].append(rate)
        if budgets.given:
            self.samples[GOODPUT].append(sum(budgets.used(one) <= 1 for one in timelines) / seconds)
        return rate


def run_generation(stage: Stage, workload: Workload) -> list[Measurement]:
    """Batches of requests that come at once, answered to their last token; subjects take turns."""
    settings, budgets = stage.settings, budgets_of(stage.settings)
    subjects = _decoders(stage)
    seen = {name: _Seen() for name in subjects}

    def sampler(name: str) -> Sampler:
        return lambda _call, turn: [seen[name].add(subjects[name].run(workload, turn), budgets)]

    runs = max(6, -(-settings.samples // workload.batch))
    calls = {name: subject.short(workload) for name, subject in subjects.items()}
    bounds = Bounds(settings.seconds, runs)
    series = measure_in_turn(calls, {name: sampler(name) for name in calls}, bounds, stage.random, stage.tick)
    return [made for name in subjects for made in _measurements(name, workload, seen[name], series[name])]


def budgets_of(settings: BenchSettings) -> Budgets:
    """Those of the settings."""
    return Budgets(settings.ttft_ms, settings.tpot_ms)


def _measurements(name: str, workload: Workload, seen: _Seen, series: Series) -> list[Measurement]:
    judged = series.stability
    made = []
    for what, samples in seen.samples.items():
        if not samples:
            continue
        rate = UNITS[what] != "ms"
        percentiles, refused = percentiles_of(samples, ("p50",) if rate else tuple(PERCENTILES))
        parts = [part for part in np.array_split(np.array(samples), WINDOWS) if len(part)]
        made.append(
            make_measurement(name, "generation", workload, samples, what).model_copy(
                update={
                    "unit": UNITS[what],
                    "warmup": [round(1e3 * seconds, 6) for seconds in series.warmup] if what == TTFT else [],
                    "percentiles": percentiles,
                    "refused": refused,
                    "windows": [round(float(np.median(part)), 6) for part in parts],
                    "spread": judged.spread,
                    "stable": judged.stable,
                    "throughput_per_s": float(np.median(samples)) if rate else None,
                }
            )
        )
    return made


def run_arrivals(stage: Stage, workload: Workload) -> tuple[list[Measurement], list[Capacity]]:
    """Single requests at random times (Poisson), at different rates: the largest one whose p99 is within both budgets.

    Raises:
        InputError: a budget is missing.
    """
    settings, budgets = stage.settings, budgets_of(stage.settings)
    check_budgets(settings)
    subjects = _decoders(stage)
    searches = {
        name: RateSearch(_full_rate(one, workload), 1.0, settings.server_runs) for name, one in subjects.items()
    }
    found: list[Measurement] = []
    for step in range(settings.server_runs):
        for name in stage.random.permutation(list(subjects)):
            rate = searches[name].next_rate()
            if rate is None:
                continue
            timelines, cut = _offer(subjects[name], workload, rate, stage)
            searches[name].tell(Served(rate, [budgets.used(one) for one in timelines], cut))
            found += _offered(name, workload, rate, timelines, cut, budgets)
        stage.tick((step + 1) / settings.server_runs)
    return found, [_capacity(name, workload, search, budgets) for name, search in searches.items()]


def check_budgets(settings: BenchSettings) -> None:
    """Make sure that both budgets are given.

    Raises:
        InputError: one is not.
    """
    for name in ("ttft_ms", "tpot_ms"):
        if getattr(settings, name) is None:
            raise InputError(f"{argument('scenarios', ['server'])} of a decoder needs {argument(name)}")


def _decoders(stage: Stage) -> Mapping[str, DecoderSubject]:
    return {name: subject for name, subject in stage.subjects.items() if isinstance(subject, DecoderSubject)}


def _full_rate(subject: DecoderSubject, workload: Workload) -> float:
    """Requests a second that batches back to back answer."""
    warm_up(subject.short(workload))
    timelines = subject.run(workload, 0)
    return len(timelines) / (max(one.tokens[-1] for one in timelines) - min(one.due for one in timelines))


def _offer(subject: DecoderSubject, workload: Workload, rate: float, stage: Stage) -> tuple[list[Timeline], bool]:
    settings = stage.settings
    count = arrivals_for(rate, settings.seconds)
    arrivals = poisson_arrivals(rate, count, stage.random)
    turns = -(-count // workload.batch)
    requests = [request for turn in range(turns) for request in subject.requests(workload, turn)][:count]
    give_up_s = GIVE_UP * (settings.ttft_ms or 0.0) / 1e3
    return answer_load(subject.session, requests, [float(each) for each in arrivals], give_up_s)


def _offered(
    name: str, workload: Workload, rate: float, timelines: Sequence[Timeline], cut: bool, budgets: Budgets
) -> list[Measurement]:
    update: dict[str, object] = {"offered_per_s": rate, "saturated": cut}
    if cut:
        update |= {"percentiles": {}, "refused": {}}
    elif timelines:
        seconds = max(one.tokens[-1] for one in timelines) - min(one.due for one in timelines)
        update["goodput_per_s"] = sum(budgets.used(one) <= 1 for one in timelines) / seconds
    values = {TTFT: [1e3 * one.ttft_s for one in timelines], TPOT: [1e3 * one.tpot_s for one in timelines]}
    return [
        make_measurement(name, "server", workload, samples, f"{what} at {rate:.4g}/s").model_copy(update=update)
        for what, samples in values.items()
    ]


def _capacity(name: str, workload: Workload, search: RateSearch, budgets: Budgets) -> Capacity:
    return Capacity(
        subject=name,
        batch=workload.batch,
        length=workload.length,
        budget_ms=budgets.ttft_ms or 0.0,
        tpot_ms=budgets.tpot_ms,
        rate_per_s=search.rate_per_s,
        bounded=search.bounded,
        refused=search.refused,
    )
