"""Before anything is timed: every server answers as the model does that is asked without a server."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from benchmarks.server.load import drawn, name_of
from benchmarks.server.peers.answering import Answers, Behind, PeftAnswerer, SessionAnswerer
from benchmarks.server.peers.contestants import Running

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-3}
"""Of a score, between rows of one batch and of another."""

ROWS = (1, 16)
REQUESTS = 24
ADAPTERS = 8
"""That the check makes again, and asks for."""

Alone = Callable[[str, str], Answers]


def reference(behind: Behind) -> Alone:
    """One text of one customer, alone: by the session, or by PEFT's only active adapter."""
    if behind.kind == "session":
        session = SessionAnswerer(behind)
        return cache(lambda text, customer: session.answer([text], [customer]))
    # Adapters are drawn one after the other, so that the first ones are the same however many there are.
    return cache(PeftAnswerer(Behind(**vars(behind) | {"customers": ADAPTERS})).answer_alone)


def check(running: Running, alone: Alone) -> dict[str, float]:
    """The largest difference of a score, over requests of one and of many rows that come at the same time.

    Raises:
        SystemExit: a label or a score is another one, or customers make no difference.
    """
    behind, worst = running.contestant.behind, 0.0
    customers = ADAPTERS if behind.kind == "peft" else behind.customers
    for rows in ROWS:
        requests = drawn(REQUESTS, rows, customers, seed=7)
        with ThreadPoolExecutor(REQUESTS) as pool:
            found = list(pool.map(lambda request: running.ask(*request), requests))
        for (texts, owners), answers in zip(requests, found, strict=True):
            expected = [alone(text, owner) for text, owner in zip(texts, owners, strict=True)]
            worst = max(worst, _difference(running, expected, answers))
    effect = _effect(alone)
    if effect < 5 * TOLERANCES[behind.precision]:
        raise SystemExit(f"{running.contestant.name}: customers change scores by {effect} only, so nothing is checked")
    return {"max_difference": worst, "customers_differ_by": effect}


def _difference(running: Running, expected: Sequence[Answers], answers: Answers) -> float:
    tolerance, worst = TOLERANCES[running.contestant.behind.precision], 0.0
    for (labels, scores), label, score in zip(expected, *answers, strict=True):
        worst = max(worst, abs(score - scores[0]))
        # Two outputs may be as likely as each other.
        if worst > tolerance or (label != labels[0] and scores[0] > 0.5 + tolerance):
            raise SystemExit(
                f"{running.contestant.name}: {label} {score}, but {labels[0]} {scores[0]} without a server"
            )
    return worst


def _effect(alone: Alone) -> float:
    text = drawn(1, 1, 1, seed=7)[0][0][0]
    scores = [alone(text, name_of(number))[1][0] for number in range(ADAPTERS)]
    return max(scores) - min(scores)
