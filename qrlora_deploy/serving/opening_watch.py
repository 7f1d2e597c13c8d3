"""What never opens is found: a model, a store or a device that does not answer while a server starts."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from qrlora_deploy.errors import QrloraError, argument

STEP_S = 1.0
"""Between two looks; less where the bound is short."""

Begin = Callable[[str], None]
"""Called with what is opened from now on, in words; with "" where nothing is: others are waited for."""


def unwatched(what: str) -> None:
    """Nobody watches."""


class Patience:
    """How long the same thing has been opening.

    Time is counted in steps and not by a clock: a machine that was stopped for an hour has not hung for an hour.

    Args:
        open_s: that one thing may take; 0: as long as it likes.
    """

    def __init__(self, open_s: float) -> None:
        self.open_s, self.step_s = open_s, min(STEP_S, open_s / 8)
        self._number, self._busy_s = -1, 0.0

    def is_over(self, number: int, what: str) -> bool:
        """Whether it took too long, asked a step after the last time.

        Args:
            number: of the thing, another one for each.
            what: the thing; "": nothing is opened.
        """
        same = what and number == self._number
        self._busy_s = self._busy_s + self.step_s if same else 0.0
        self._number = number
        return bool(self.open_s) and self._busy_s >= self.open_s


class OpeningWatch:
    """Watches over the process itself, from a thread, for as long as it is entered.

    Args:
        open_s: as of `Patience`.
        give_up: called in the thread with what is wrong; whoever opens never returns, so that it must end the process.
    """

    def __init__(self, open_s: float, give_up: Callable[[QrloraError], None]) -> None:
        self._patience, self._give_up = Patience(open_s), give_up
        self._opened = threading.Event()
        self._number, self._what = 0, ""

    def begin(self, what: str) -> None:
        """As `Begin`."""
        self._number, self._what = self._number + 1, what

    def __enter__(self) -> Self:
        if self._patience.open_s:
            threading.Thread(target=self._follow, name="opening", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.set()

    def _follow(self) -> None:
        while not self._opened.wait(self._patience.step_s):
            if self._patience.is_over(self._number, self._what):
                self._give_up(QrloraError(never_opened(self._what, self._patience.open_s)))
                return


def never_opened(what: str, open_s: float) -> str:
    """What is wrong, and what to do, in one line."""
    longer = argument("open_s", f"{2 * open_s:g}")
    return f"{what} was not open after {open_s:g} s; look whether its disk, store or device answers, or give {longer}"
