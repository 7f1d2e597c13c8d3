"""Which rule of the learning rate comes nearest to the best of a sweep, from the lines of `benchmarks.glue`.

    python -m benchmarks.step_size benchmarks/results/step_size/runs.jsonl

A set-up is a task, a start and a placement with at least three rates and a line of "@measure". Each rule has one
constant, the best of a grid, for all set-ups; the table shows how many points it stays below the sweep's best rate.
"""

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.glue.records import read_records
from benchmarks.glue.runs import WARM_UP
from benchmarks.glue.tasks import ALL_TASKS

BY_COUNT = "number of coefficients"
DIRECTIONS = ("mean", "random")
MEASURES = ("kl", "relative", "features")
POWERS = (0.0, 0.25, 0.5)
STEPS = 300
"""At which a power of the steps is 1."""

GRID = np.arange(-20.0, 4.0, 0.5)
BELOW, ABOVE = 0.01, 0.02
"""What a doubling beyond the rates of the sweep is taken to cost."""


@dataclass(frozen=True)
class Setup:
    """A sweep: `rates` (log2, rising) with their scores, what a step does, and how many steps a run has."""

    rates: np.ndarray
    scores: np.ndarray
    probe: dict[str, Any]
    rule: float
    steps: int

    def regret(self, rate: float) -> float:
        """How much worse a rate (log2) is than the best one, between the rates of the sweep by straight lines."""
        beyond = BELOW * max(0.0, self.rates[0] - rate) + ABOVE * max(0.0, rate - self.rates[-1])
        return float(self.scores.max() - np.interp(rate, self.rates, self.scores) + beyond)

    def rate_by(self, direction: str, measure: str, target: float) -> float:
        """The rate (log2) by a rule whose constant is `target` (log2)."""
        if direction == BY_COUNT:
            return math.log2(self.rule) + target
        changes = np.log2(np.maximum(self.probe[direction][measure], 1e-15))
        return float(np.interp(target, np.maximum.accumulate(changes), np.log2(self.probe["lengths"])))


def read_setups(path: Path) -> list[Setup]:
    """The set-ups of a record that have a sweep."""
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    probes: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in read_records(path):
        place = record["method"].partition("@")[0]
        key: tuple[str, ...] = (record["model"], record["task"], record["start"], place)
        if "probe" in record:
            probes[key] = record
        elif "error" not in record and record["method"] != WARM_UP:
            runs[key].append(record)
    found = []
    for key, own in runs.items():
        if len(own) >= 3 and key in probes:
            own.sort(key=lambda record: record["learning_rate"])
            metric = ALL_TASKS[key[1]].metrics[0]
            rates = np.log2([record["learning_rate"] for record in own])
            scores = np.array([record["metrics"][metric] for record in own])
            probe = probes[key]
            found.append(Setup(rates, scores, probe["probe"], probe["learning_rate"], own[0]["steps"]))
    return found


def judge(setups: list[Setup], direction: str, measure: str, power: float) -> tuple[float, float, float]:
    """Mean and worst regret of a rule with its best constant, and the constant (log2)."""
    best = (math.inf, math.inf, 0.0)
    for target in GRID:
        shifts = [power * math.log2(setup.steps / STEPS) for setup in setups]
        rates = [setup.rate_by(direction, measure, target) - shift for setup, shift in zip(setups, shifts, strict=True)]
        regrets = [setup.regret(rate) for setup, rate in zip(setups, rates, strict=True)]
        best = min(best, (float(np.mean(regrets)), max(regrets), float(target)))
    return best


def main() -> None:
    """Parse, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    setups = read_setups(parser.parse_args().record)
    print(f"{len(setups)} set-ups\n\n| rule | steps | mean | worst | constant, log2 |\n| --- | --- | --- | --- | --- |")
    rules = [(BY_COUNT, ""), *((direction, measure) for direction in DIRECTIONS for measure in MEASURES)]
    for direction, measure in rules:
        for power in POWERS:
            mean, worst, target = judge(setups, direction, measure, power)
            print(f"| {direction} {measure} | ^-{power} | {100 * mean:.2f} | {100 * worst:.1f} | {target} |")


if __name__ == "__main__":
    main()
