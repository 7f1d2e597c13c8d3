"""Reports for tests, with latencies from a seed."""

import functools
from collections.abc import Sequence

import numpy as np

from qrlora_deploy.bench.measurements import compare, make_measurement, measurement_of
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import (
    Accuracy,
    Capacity,
    Customer,
    Environment,
    Memory,
    Parity,
    Settings,
    Subject,
)
from qrlora_deploy.bench.rounds import Series
from qrlora_deploy.bench.workload import Workload

SHAPE = Workload(1, 32)


def subject(name: str, role: str = "candidate", kind: str = "switchable") -> Subject:
    """A bundle that nothing is wrong with."""
    return Subject.model_validate(
        {
            "name": name,
            "role": role,
            "kind": kind,
            "path": name,
            "digest": "d" * 64,
            "precision": "fp32",
            "provider": "CPUExecutionProvider",
            "size_bytes": 90_000_000,
            "memory": Memory(host_peak_bytes=200_000_000, host_before_bytes=80_000_000, device_bytes=50_000_000),
            "parity": Parity(
                max_abs_error=5e-6, bound=1e-4, label_agreement=1.0, effect_correlation=0.9999, passed=True
            ),
        }
    )


def series(seed: int, level: float, count: int = 500, windows: Sequence[float] | None = None) -> Series:
    """Latencies, or rates, around a level."""
    random = np.random.default_rng(seed)
    samples = [float(value) for value in level * np.exp(0.03 * random.normal(size=count))]
    medians = [float(np.median(part)) for part in np.array_split(np.array(samples), 10)]
    return Series([3 * level] * 5, samples, list(windows) if windows is not None else medians)


@functools.cache
def good_report(slower: float = 1.0, windows: tuple[float, ...] | None = None) -> Report:
    """A candidate beside a reference, everything measured; times `slower`, `windows` of its single runs."""
    big = Workload(8, 32)
    measurements = [
        measurement_of("old", "single-stream", SHAPE, series(0, 4e-3)),
        measurement_of("new", "single-stream", SHAPE, series(1, 4e-3 * slower, windows=windows)),
        measurement_of("old", "offline", SHAPE, series(2, 200.0)),
        measurement_of("new", "offline", SHAPE, series(3, 200.0 / slower)),
        measurement_of("old", "offline", big, series(4, 500.0)),
        measurement_of("new", "offline", big, series(5, 500.0 / slower)),
        make_measurement("new", "cold-start", SHAPE, [400.0 + step for step in range(10)]),
        make_measurement("new", "idle-gap", SHAPE, [6.0 + 0.1 * step for step in range(10)], "after 1 s"),
        make_measurement("new", "server", SHAPE, [6.0 * value for value in series(6, 1.0).samples], "60/s").model_copy(
            update={"offered_per_s": 60.0}
        ),
        make_measurement("new", "server", SHAPE, [9.0 * value for value in series(7, 1.0).samples], "90/s").model_copy(
            update={"offered_per_s": 90.0}
        ),
    ]
    return Report(
        settings=Settings(
            scenarios=["single-stream", "offline", "server", "idle-gap", "cold-start"],
            provider="cpu",
            threads=None,
            batches=[1, 8],
            lengths=[32],
            mix="different",
            seconds=20,
            samples=368,
            seed=0,
        ),
        environment=Environment(
            date="2026-01-01T00:00:00+00:00",
            host={"system": "Linux", "architecture": "x86_64", "cpu": "a processor", "cores": 2, "cores_allowed": 2},
            versions={"qrlora-deploy": "0", "python": "3.12", "onnxruntime": "1.31"},
        ),
        subjects=[subject("old", "reference"), subject("new")],
        customers=[Customer(name="acme", size_bytes=2500, digest="a" * 64), Customer(name="bolt", size_bytes=2500)],
        measurements=measurements,
        capacities=[Capacity(subject="new", batch=1, length=32, budget_ms=20.0, rate_per_s=90.0, bounded=True)],
        comparisons=compare(measurements, "old", 0),
        accuracy=[
            Accuracy(
                subject=name,
                customer=customer,
                data=f"{customer}.tsv",
                rows=100,
                accuracy=0.9,
                base_accuracy=0.7,
                reference_accuracy=0.9,
            )
            for name in ("old", "new")
            for customer in ("acme", "bolt")
        ],
    )
