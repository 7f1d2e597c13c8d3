"""A benchmark from its settings to its report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qrlora_deploy.bench.choosing import baseline, earlier_names, make_specs, make_workloads, open_bundles, settled
from qrlora_deploy.bench.environment import describe_environment
from qrlora_deploy.bench.fresh import start_fresh
from qrlora_deploy.bench.generation.scenarios import run_arrivals, run_generation
from qrlora_deploy.bench.generation.scoring import measure_answers
from qrlora_deploy.bench.generation.subject import DecoderSubject
from qrlora_deploy.bench.labelled import labelled_files, measure_accuracy, with_reference
from qrlora_deploy.bench.limits import describe_limits, machine_differences
from qrlora_deploy.bench.measurements import compare, compare_earlier, make_measurement
from qrlora_deploy.bench.opening import open_subject
from qrlora_deploy.bench.report import Report, read_report
from qrlora_deploy.bench.report_parts import (
    Accuracy,
    Capacity,
    Customer,
    Measurement,
    Memory,
    Parity,
    Scenario,
    Settings,
)
from qrlora_deploy.bench.report_parts import Subject as SubjectRecord
from qrlora_deploy.bench.scenarios import (
    Stage,
    run_idle_gap,
    run_offline,
    run_server,
    run_single_stream,
    run_swap,
    smallest_batch,
)
from qrlora_deploy.bench.settings import BenchSettings, Progress
from qrlora_deploy.bench.subjects import BundleSubject, OpenBundle, Spec, Subject, customer_file, largest
from qrlora_deploy.bench.workload import Workload
from qrlora_deploy.errors import InputError
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.verification.parity import verify


@dataclass
class _Found:
    measurements: list[Measurement] = field(default_factory=list)
    capacities: list[Capacity] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    memory: dict[str, Memory] = field(default_factory=dict)


def run_benchmark(
    settings: BenchSettings, progress: Progress | None = None, data: dict[str, Path] | None = None
) -> Report:
    """Open everything, measure, compare.

    Args:
        settings: what to do.
        progress: told (description, done, total).
        data: customers' labelled files beside those of `settings.labelled`.

    Returns:
        The report without a gate.

    Raises:
        InputError: a bundle, a file or a setting is wrong.
        QrloraError: a run failed.
    """
    settings = settled(settings)
    environment = describe_environment()
    earlier = read_report(settings.earlier) if settings.earlier is not None else None
    files = (labelled_files(settings.labelled) if settings.labelled is not None else {}) | (data or {})
    bundles = open_bundles(settings)
    specs = make_specs(settings, bundles)
    workloads = make_workloads(settings, bundles)
    kept = _kept(settings, workloads)
    subjects = _open(specs, workloads, bundles, progress)
    found = _Found()
    _measure(settings, specs, subjects, workloads, found, progress)
    for name, subject in subjects.items():
        if isinstance(subject, OpenBundle) and files:
            _tell(progress, f"accuracy of {name}", 0, 1)
            found.accuracy += _accuracy(subject, files)
    first = baseline(specs)
    comparisons, before, theirs = compare(found.measurements, first, settings.seed), found.accuracy, {first}
    if earlier is not None:
        names, caveat = earlier_names(specs, earlier), "; ".join(machine_differences(environment, kept, earlier))
        comparisons += compare_earlier(found.measurements, earlier.measurements, names, settings.seed, caveat)
        before, theirs = earlier.accuracy, set(names.values())
    accuracy = with_reference(found.accuracy, [item for item in before if item.subject in theirs])
    report = Report(
        settings=kept,
        environment=environment,
        subjects=[
            _described(subject, found.memory.get(name), settings, progress) for name, subject in subjects.items()
        ],
        customers=_customers(subjects),
        measurements=found.measurements,
        capacities=found.capacities,
        comparisons=comparisons,
        accuracy=accuracy,
    )
    return report.model_copy(update={"notes": describe_limits(report, earlier)})


def _accuracy(subject: OpenBundle, files: dict[str, Path]) -> list[Accuracy]:
    if isinstance(subject, DecoderSubject):
        return measure_answers(subject, files)
    return measure_accuracy(subject, files) if isinstance(subject, BundleSubject) else []


def _measure(
    settings: BenchSettings,
    specs: Sequence[Spec],
    subjects: dict[str, Subject],
    workloads: Sequence[Workload],
    found: _Found,
    progress: Progress | None,
) -> None:
    """Every scenario of the settings, in their order."""
    random = np.random.default_rng(settings.seed)
    simple: dict[Scenario, Callable[[Stage, Workload], list[Measurement]]] = {
        "single-stream": run_single_stream,
        "offline": run_offline,
        "idle-gap": run_idle_gap,
        "swap": run_swap,
        "generation": run_generation,
    }
    _fresh(settings, specs, workloads, found, progress)
    for scenario in settings.scenarios:
        shapes = _shapes(settings, scenario, workloads)
        for workload in shapes if scenario != "cold-start" else ():
            title = f"{scenario} {workload.name}"

            def tick(share: float, title: str = title) -> None:
                _tell(progress, title, int(100 * share), 100)

            stage = Stage(settings, subjects, random, tick)
            if scenario == "server":
                measured, capacities = (run_arrivals if settings.new_tokens else run_server)(stage, workload)
                found.measurements += measured
                found.capacities += capacities
            else:
                found.measurements += simple[scenario](stage, workload)
            tick(1.0)


def _shapes(settings: BenchSettings, scenario: Scenario, workloads: Sequence[Workload]) -> Sequence[Workload]:
    """Those that a scenario takes: all, or for each length one batch."""
    if scenario in ("single-stream", "offline", "generation"):
        return workloads
    if settings.new_tokens is None:
        return smallest_batch(workloads)
    # Of a decoder the batch is how many answers run side by side.
    most = max(workload.batch for workload in workloads)
    return [workload for workload in workloads if workload.batch == most]


def _fresh(
    settings: BenchSettings,
    specs: Sequence[Spec],
    workloads: Sequence[Workload],
    found: _Found,
    progress: Progress | None,
) -> None:
    """Processes of their own: memory of every subject, and the cold starts where they are asked for."""
    first, large = smallest_batch(workloads)[0], largest(workloads)
    repeats = settings.repeats if "cold-start" in settings.scenarios else 1
    samples: dict[str, list[float]] = {spec.name: [] for spec in specs}
    for repeat in range(repeats):
        for spec in specs:
            fresh = start_fresh(spec, first, large)
            samples[spec.name].append(1e3 * fresh.first_answer_s)
            found.memory[spec.name] = fresh.memory
        _tell(progress, "processes of their own", repeat + 1, repeats)
    if "cold-start" in settings.scenarios:
        found.measurements += [make_measurement(name, "cold-start", first, values) for name, values in samples.items()]


def _open(
    specs: Sequence[Spec], workloads: Sequence[Workload], bundles: dict[Path, Bundle], progress: Progress | None
) -> dict[str, Subject]:
    subjects: dict[str, Subject] = {}
    for index, spec in enumerate(specs):
        subject = open_subject(spec, workloads, bundles.get(spec.path))
        if isinstance(subject, OpenBundle) and subject.refused and not subject.customers:
            name, reason = next(iter(subject.refused.items()))
            raise InputError(f"none of the {len(subject.refused)} customers can be served, such as {name}: {reason}")
        subjects[spec.name] = subject
        _tell(progress, "opening", index + 1, len(specs))
    return subjects


def _described(
    subject: Subject, memory: Memory | None, settings: BenchSettings, progress: Progress | None
) -> SubjectRecord:
    parity = None
    if isinstance(subject, OpenBundle):
        _tell(progress, f"parity of {subject.record.name}", 0, 1)
        found = verify(subject.bundle, settings.provider, settings.threads, progress)
        finite = bool(np.isfinite(found.max_abs_error))
        parity = Parity(
            max_abs_error=found.max_abs_error if finite else None,
            bound=found.bound,
            label_agreement=found.label_agreement,
            effect_correlation=found.effect_correlation,
            passed=found.passed,
        )
    return subject.record.model_copy(update={"memory": memory, "parity": parity})


def _customers(subjects: dict[str, Subject]) -> list[Customer]:
    """Every file that a subject was given; refused by one is refused."""
    refused: dict[str, str] = {}
    places: dict[str, Path] = {}
    for subject in subjects.values():
        if isinstance(subject, OpenBundle):
            refused |= subject.refused
            places |= {name: customer_file(subject.spec, name) for name in [*subject.customers, *subject.refused]}
    return [
        Customer(
            name=name,
            size_bytes=path.stat().st_size if path.is_file() else 0,
            digest=digest_file(path) if path.is_file() else "",
            refused=refused.get(name, ""),
        )
        for name, path in sorted(places.items())
    ]


def _kept(settings: BenchSettings, workloads: Sequence[Workload]) -> Settings:
    return Settings(
        scenarios=list(settings.scenarios),
        provider=settings.provider,
        threads=settings.threads,
        batches=list(settings.batches),
        lengths=sorted({workload.length for workload in workloads if workload.length is not None}),
        data=str(settings.data) if settings.data is not None else "",
        mix=settings.mix,
        seconds=settings.seconds,
        samples=settings.samples,
        seed=settings.seed,
        p99_budget_ms=settings.p99_budget_ms,
        server_runs=settings.server_runs,
        workers=settings.workers,
        idle_seconds=settings.idle_seconds,
        repeats=settings.repeats,
        swaps_per_s=settings.swaps_per_s,
        new_tokens=settings.new_tokens,
        ttft_ms=settings.ttft_ms,
        tpot_ms=settings.tpot_ms,
    )


def _tell(progress: Progress | None, description: str, done: int, total: int) -> None:
    if progress is not None:
        progress(description, done, total)
