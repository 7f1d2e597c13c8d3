"""Whether answers are right, and counts of what came back, which each client keeps in a file of its own."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.server_soak.place import CUSTOMERS, NEVER, Known

NEAR = 1e-3
"""Logits and scores of two runs in fp32, whose batches differ, are that near; those of two versions are not."""

STALE_S = 10.0
"""A version that was replaced so long before a request began may not answer it."""


@dataclass
class Told:
    """Counts of a client.

    Attributes:
        path: where they are kept.
        counts: by what happened; "wrong ...", "lost ..." and "unexplained ..." are faults.
        notes: of the first faults, a line each.
        stale_s: the longest time after its replacement that a version has answered.
    """

    path: Path
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    stale_s: float = 0.0

    def add(self, what: str, times: int = 1) -> None:
        """Something happened."""
        self.counts[what] += times

    def fault(self, what: str, note: object) -> None:
        """Something happened that must not."""
        self.counts[what] += 1
        if len(self.notes) < 20:
            self.notes.append(f"{what}: {note}"[:400])

    def write(self) -> None:
        """Keep the counts; another process may read them at any time."""
        record = {"counts": self.counts, "notes": self.notes, "stale_s": self.stale_s}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record))
        temporary.replace(self.path)


@dataclass(frozen=True)
class Given:
    """The answer for a row, as a client has it.

    Attributes:
        digest: of who answered.
        logits: of it, or none.
        score: of it, or none.
    """

    digest: str
    logits: np.ndarray | None = None
    score: float | None = None


class Checker:
    """Holds answers against those of the session.

    Args:
        known: what is right.
        replaced_s: see `Place.replaced_s`.
        told: is told of faults.
    """

    def __init__(self, known: Known, replaced_s: np.ndarray, told: Told) -> None:
        self._known, self._replaced_s, self._told = known, replaced_s, told

    def check(self, texts: Sequence[int], customers: Sequence[int], given: Sequence[Given], begun_s: float) -> None:
        """Check the rows of an answer.

        Args:
            texts: their numbers.
            customers: of each row; `CUSTOMERS` is the base.
            given: the answers.
            begun_s: when the request was sent, of `time.monotonic`.
        """
        if len(given) != len(texts):
            self._told.fault("wrong number of rows", f"{len(given)} of {len(texts)}")
            return
        self._told.add("rows", len(texts))
        for text, customer, answer in zip(texts, customers, given, strict=True):
            self._check_row(text, customer, answer, begun_s)

    def _check_row(self, text: int, customer: int, answer: Given, begun_s: float) -> None:
        owner, number = self._known.versions.get(answer.digest, (CUSTOMERS if not answer.digest else -1, 0))
        if owner != customer:
            self._told.fault("wrong customer", f"{customer} was asked, {owner} has answered, digest {answer.digest}")
            return
        if customer < CUSTOMERS:
            self._check_age(customer, number, begun_s)
        if answer.logits is not None:
            right = np.abs(self._known.logits[owner, number, text] - answer.logits).max() < NEAR
        else:
            right = answer.score is not None and abs(self._known.scores[owner, number, text] - answer.score) < NEAR
        if not right:
            self._told.fault("wrong numbers", f"customer {customer}, version {number}, text {text}: {answer}")

    def _check_age(self, customer: int, number: int, begun_s: float) -> None:
        replaced_s = self._replaced_s[customer, number]
        if replaced_s == NEVER:
            self._told.fault("wrong version", f"{number} of customer {customer} was not there yet")
        elif replaced_s > 0:
            age_s = begun_s - replaced_s
            self._told.stale_s = max(self._told.stale_s, float(age_s))
            if age_s > STALE_S:
                self._told.fault("wrong version", f"{number} of customer {customer}, replaced {age_s:.1f} s before")


def now() -> float:
    """The clock that all processes share."""
    return time.monotonic()
