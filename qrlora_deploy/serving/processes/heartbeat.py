"""A process that hangs is found: it never opens, says nothing when it is asked, or does the same run for too long."""

import asyncio
from typing import Protocol

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.opening_watch import Patience, never_opened

STEP_S = 1.0
"""Between two questions; less where the bound is short."""


class Alive(Protocol):
    """A process that is asked; `children.Child` is one.

    Attributes:
        name: for people.
        failure: why it ends.
        ready: set when it does its work.
        opening: number and name of what it opens; "": nothing.
        pulse: the number of the run that is under way by what runs it, 0: none; None: no answer since it was asked.
    """

    failure: QrloraError | None
    ready: asyncio.Event
    opening: tuple[int, str]
    pulse: dict[str, int] | None

    @property
    def name(self) -> str:
        """As above."""

    def ask_pulse(self) -> None:
        """Forget the answer before, and ask."""

    def kill(self, what_it_did: str = "") -> None:
        """End it."""


async def kill_if_it_never_opens(process: Alive, open_s: float, ending: asyncio.Event) -> None:
    """Follow a process until it is ready; kill it, and return, where it does not get on.

    Args:
        process: says what it opens.
        open_s: that one thing may take; 0: as long as it likes.
        ending: set when all end.
    """
    patience = Patience(open_s)
    while open_s and not (process.ready.is_set() or ending.is_set()):
        await asyncio.sleep(patience.step_s)
        number, what = process.opening
        if patience.is_over(number, what) and not (process.ready.is_set() or ending.is_set()):
            process.failure = QrloraError(f"{process.name}: {never_opened(what, open_s)}")
            process.kill("never opened")
            return


async def kill_if_it_hangs(process: Alive, hang_s: float, ending: asyncio.Event) -> None:
    """Follow a process from when it is ready; kill it, and return, where it hangs.

    Args:
        process: answers from its event loop, which neither runs nor loads anything.
        hang_s: that it may be silent, and that a run may take; 0: as long as it likes.
        ending: set when all end, which has bounds of its own.
    """
    await process.ready.wait()
    step_s = min(STEP_S, hang_s / 8)
    heart = Heart(hang_s, step_s)
    while hang_s and not ending.is_set():
        process.ask_pulse()
        await asyncio.sleep(step_s)
        what_it_did = heart.felt(process.pulse)
        if what_it_did and not ending.is_set():
            process.kill(what_it_did)
            return


class Heart:
    """How long a process has been silent, or busy with one run.

    Time is counted in steps and not by a clock: a machine, or a whole group of processes, that was stopped for an
    hour has not hung for an hour.

    Args:
        hang_s: bound of both.
        step_s: from one look to the next.
    """

    def __init__(self, hang_s: float, step_s: float) -> None:
        self._hang_s, self._step_s = hang_s, step_s
        self._silent_s = 0.0
        self._runs: dict[str, int] = {}
        self._busy_s: dict[str, float] = {}

    def felt(self, pulse: dict[str, int] | None) -> str:
        """What the process did that it must not, in words, with what it said a step after it was asked; usually ""."""
        self._silent_s = 0.0 if pulse is not None else self._silent_s + self._step_s
        if self._silent_s >= self._hang_s:
            return f"did not answer for {self._hang_s:g} s"
        for name, run in (pulse or {}).items():
            same = run and run == self._runs.get(name)
            self._busy_s[name] = self._busy_s.get(name, 0.0) + self._step_s if same else 0.0
            self._runs[name] = run
            if self._busy_s[name] >= self._hang_s:
                return f"had a run of {name} that took more than {self._hang_s:g} s"
        return ""
