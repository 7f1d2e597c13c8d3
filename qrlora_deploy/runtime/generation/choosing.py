"""The next token of each row of a run."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.generation.sampling import Choice, Sampler
from qrlora_deploy.runtime.generation.stepping import Answers
from qrlora_deploy.runtime.host.forking import survive_forks

Chosen = Choice | QrloraError

MOST_THREADS = 16
PART_LOGITS = 100_000
"""A thread is given as many logits at least: fewer are looked at before another one has begun."""


class Chooser:
    """Chooses tokens: by what is known where the logits lie; else several rows at a time, looking at every logit.

    A row's choice follows from its own logits and sampler, so threads change no token.

    Args:
        threads: of its own; None: as many as there are processors for this process, up to `MOST_THREADS`.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = min(_processors() if threads is None else threads, MOST_THREADS)
        self._pool: ThreadPoolExecutor | None = None
        survive_forks(self)

    def before_fork(self) -> None:
        """Nothing to do."""

    def after_fork(self, in_child: bool) -> None:
        """Threads do not live in a forked child, which makes others."""
        if in_child:
            self._pool = None

    def all(self, samplers: Mapping[int, Sampler], answers: Answers) -> dict[int, Chosen]:
        """What each row chooses, or why its logits cannot be used.

        Args:
            samplers: by row.
            answers: of the run.
        """
        found: dict[int, Chosen] = {}
        others: dict[int, Sampler] = {}
        for row, sampler in samplers.items():
            token = answers.likeliest(row) if sampler.takes_likeliest else None
            if token is None:
                others[row] = sampler
            else:
                found[row] = sampler.take(Choice(token))
        if others and answers.draws is not None:
            found.update(_drawn(others, answers, answers.draws))
            others = {row: sampler for row, sampler in others.items() if row not in found}
        if others:
            rows = [(others[row], logits) for row, logits in zip(others, answers.logits(list(others)), strict=True)]
            found.update(zip(others, self._choose(rows), strict=True))
        return found

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _choose(self, rows: Sequence[tuple[Sampler, np.ndarray]]) -> list[Chosen]:
        each = max(1, PART_LOGITS // len(rows[0][1]), -(-len(rows) // self._threads))
        parts = [rows[start : start + each] for start in range(0, len(rows), each)]
        if len(parts) == 1:
            return _choices(rows)
        # This thread does the first part itself.
        self._pool = self._pool or ThreadPoolExecutor(self._threads - 1, thread_name_prefix="choosing")
        others = [self._pool.submit(_choices, part) for part in parts[1:]]
        return _choices(parts[0]) + [choice for part in others for choice in part.result()]


def _drawn(samplers: Mapping[int, Sampler], answers: Answers, vocabulary: int) -> dict[int, Choice]:
    """What rows choose where the logits lie, as far as that can be known there."""
    wishes = {row: wish for row, sampler in samplers.items() if (wish := sampler.wish(vocabulary)) is not None}
    if not wishes:
        return {}
    return {row: samplers[row].take(choice) for row, choice in answers.drawn(wishes).items()}


def _choices(rows: Sequence[tuple[Sampler, np.ndarray]]) -> list[Chosen]:
    return [_choice(sampler, logits) for sampler, logits in rows]


def _choice(sampler: Sampler, logits: np.ndarray) -> Chosen:
    try:
        return sampler.choose(logits)
    except QrloraError as error:
        return error


def _processors() -> int:
    """For this process: a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
