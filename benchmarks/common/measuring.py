"""What every benchmark's record holds: the machine, samples summed up, and how contenders take turns."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qrlora_deploy.bench.environment import describe_environment
from qrlora_deploy.bench.statistics import PERCENTILES, quantile

REPORTED = ("p50", "p90", "p95", "p99")
"""Of `PERCENTILES`; the number of samples beside them says what the last ones are worth."""


def summary(samples_s: Sequence[float], unit: float = 1e3) -> dict[str, float]:
    """Percentiles of samples in seconds, in milliseconds by default, and how many samples there were."""
    samples = np.asarray(samples_s, dtype=np.float64) * unit
    return {name: quantile(samples, PERCENTILES[name]) for name in REPORTED} | {"samples": len(samples)}


def environment(device: str) -> dict[str, Any]:
    """Machine, versions and date as `bench` records them, and where the benchmark ran.

    Args:
        device: "cpu" or "cuda".
    """
    return describe_environment().model_dump(mode="json") | {"device": _device_name(device), "tf32": False}


def _device_name(device: str) -> str:
    if device != "cuda":
        return device
    import torch

    return torch.cuda.get_device_name()


def in_turn(
    calls: Mapping[str, Callable[[], Any]], random: np.random.Generator, more: Callable[[int], bool]
) -> dict[str, list[float]]:
    """Seconds of single runs: rounds in which every call has its turn, in a random order.

    What ran before leaves its threads and caches, so that of two runs of a turn the second counts. There is no rest
    between turns, unlike in `bench`: published figures were taken so.

    Args:
        calls: by name. random: their order.
        more: whether there is another round after this many.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds = 0
    while more(rounds):
        for name in random.permutation(list(calls)):
            calls[name]()
            start = time.perf_counter()
            calls[name]()
            samples[name].append(time.perf_counter() - start)
        rounds += 1
    return samples
