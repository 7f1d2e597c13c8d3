"""The next token of each row of a run."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.generation.sampling import Choice, Sampler
from qrlora_deploy.runtime.generation.stepping import Answers

MOST_THREADS = 8


class Choosing:
    """Chooses tokens; rows that need their logits are shared out among threads.

    Args:
        threads: how many, this one included.
    """

    def __init__(self, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(threads, "choosing") if threads > 1 else None

    def choose(self, samplers: Mapping[int, Sampler], answers: Answers) -> dict[int, Choice | QrloraError]:
        """What each row chooses, or why its logits cannot be used.

        Args:
            samplers: by row.
            answers: of the run.
        """
        found: dict[int, Choice | QrloraError] = {}
        others = {}
        for row, sampler in samplers.items():
            token = answers.likeliest(row) if sampler.takes_likeliest else None
            if token is None:
                others[row] = sampler
            else:
                found[row] = sampler.take(token)
        if others:
            logits = answers.logits(list(others))
            # The libraries beneath let other threads go on meanwhile.
            run = map if self._pool is None or len(others) == 1 else self._pool.map
            found.update(zip(others, run(_choose, others.values(), logits), strict=True))
        return found


def free_threads() -> int:
    """As many as are of use beside one that waits for a GPU."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_THREADS, processors)


def _choose(sampler: Sampler, logits: np.ndarray) -> Choice | QrloraError:
    try:
        return sampler.choose(logits)
    except QrloraError as error:
        return error
