"""Requests to a decoder at their times, and when each of their tokens came."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.generation.session import GenerationSession
from qrlora_deploy.runtime.generation.streams import AnswerStream

POLL_S = 0.05
"""The longest sleep while nothing runs and the next request is not due."""


@dataclass
class Timeline:
    """When the tokens of one answer came.

    Attributes:
        due: when the request was due, in seconds of `time.perf_counter`.
        tokens: when each token was there to be read.
    """

    due: float
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Time to first token: waiting and the prompt are in it."""
        return self.tokens[0] - self.due

    @property
    def tpot_s(self) -> float:
        """Time per output token behind the first one, the mean of the answer; 0 where there is no other."""
        return (self.tokens[-1] - self.tokens[0]) / max(1, len(self.tokens) - 1)

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: each single time between two tokens."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


def answer_load(
    session: GenerationSession,
    requests: Sequence[GenerationRequest],
    arrivals_s: Sequence[float] | None = None,
    give_up_s: float | None = None,
) -> tuple[list[Timeline], bool]:
    """Answer requests, side by side as the session does, whether it keeps up with them or not.

    Args:
        session: open, and nobody else's meanwhile.
        requests: in the order of their arrival.
        arrivals_s: seconds from now on at which they are due; None: all at once.
        give_up_s: where a request has waited so long for its first token, the queue grows, and the run is cut off.

    Returns:
        A timeline for each answered request, in order, and whether the run was cut off.

    Raises:
        QrloraError: a request is refused, or the model fails.
    """
    start = time.perf_counter()
    dues = [start + arrival for arrival in (arrivals_s if arrivals_s is not None else [0.0] * len(requests))]
    timelines: list[Timeline] = []
    running: list[tuple[AnswerStream, Timeline]] = []
    cut = False
    try:
        while not cut and (running or len(timelines) < len(requests)):
            while len(timelines) < len(requests) and dues[len(timelines)] <= time.perf_counter():
                timeline = Timeline(dues[len(timelines)])
                running.append((session.submit(requests[len(timelines)]), timeline))
                timelines.append(timeline)
            if not running:
                time.sleep(min(POLL_S, max(0.0, dues[len(timelines)] - time.perf_counter())))
                continue
            _step(running)
            now = time.perf_counter()
            cut = give_up_s is not None and any(not one.tokens and now - one.due > give_up_s for _, one in running)
    finally:
        for stream, _ in running:
            stream.cancel()
        if running:
            running[0][0].wait()
    return [timeline for timeline in timelines if timeline.tokens], cut


def _step(running: list[tuple[AnswerStream, Timeline]]) -> None:
    """One step of all answers; those that have ended leave."""
    running[0][0].wait()
    now = time.perf_counter()
    for stream, timeline in list(running):
        for event in stream.ready():
            timeline.tokens += [now] * len(event.choices)
        if stream.ended:
            # A request that failed has no figure: its error ends the run.
            stream.result()
            running.remove((stream, timeline))
