"""Which runs there are, the ones that say most first."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

FACTORS = (3.0, 6.0, 10.0, 1.0, 2.0)
"""Of the default rate of classifiers; that of decoders is 3 times it."""

SETUPS: dict[str, list[str]] = {"all linear layers": [], "query and value": ["query", "value"]}
"""Patterns of the targets."""

LORA_RATES = {"all linear layers": (1e-3, 3e-3), "query and value": (3e-3, 1e-3)}
RANK, ALPHA = 8, 16


@dataclass(frozen=True)
class Planned:
    """One run.

    Attributes:
        method: "coefficients" or "lora".
        factor: of the default rate, for coefficients.
        rate: for LoRA.
    """

    task: str
    method: str
    setup: str
    seed: int
    factor: float | None = None
    rate: float | None = None

    def is_done(self, runs: Sequence[dict[str, Any]]) -> bool:
        """Whether it is among `runs`."""
        mine = asdict(self)
        return any(all(run[name] == value for name, value in mine.items()) for run in runs)


def planned(
    tasks: Sequence[str], setups: Sequence[str], seeds: Sequence[int], factors: Sequence[float] = FACTORS
) -> list[Planned]:
    """All runs of a seed before those of the next one, both methods in turn."""
    runs = []
    for seed in seeds:
        for number, (task, setup) in product(range(len(factors)), product(tasks, setups)):
            runs.append(Planned(task, "coefficients", setup, seed, factor=factors[number]))
            if number < len(LORA_RATES[setup]):
                runs.append(Planned(task, "lora", setup, seed, rate=LORA_RATES[setup][number]))
    return runs
