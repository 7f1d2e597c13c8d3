"""From threads to an event loop and back: what comes together is handed over together, with one wake-up for all."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

Call = Callable[[], object]


class Handover:
    """Calls that threads want made in an event loop. Waking the loop takes longer than most of them.

    Safe for many threads. Calls are made in their order; those of a loop that has ended are dropped.

    Args:
        loop: makes them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Call] = deque()
        self._woken = False

    def add(self, call: Call) -> None:
        """Have a call made soon."""
        self._calls.append(call)
        # Whoever sees it woken came before the calls are looked at.
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._make)

    def _make(self) -> None:
        self._woken = False
        try:
            while self._calls:
                self._calls.popleft()()
        finally:
            # One that failed keeps none of the others.
            if self._calls:
                self.add(self._calls.popleft())


_here = threading.local()


def handover_here() -> Handover:
    """The one of the event loop that runs in this thread; all who ask there share it.

    Raises:
        RuntimeError: none runs.
    """
    loop = asyncio.get_running_loop()
    known: tuple[asyncio.AbstractEventLoop, Handover] | None = getattr(_here, "known", None)
    if known is None or known[0] is not loop:
        known = _here.known = (loop, Handover(loop))
    return known[1]


class EndOfTurn:
    """A call that is made once at the end of the event loop's turn, however often it is asked for in that.

    Where no loop runs it is made at once.

    Args:
        call: it.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._asked_in: asyncio.AbstractEventLoop | None = None

    def ask(self) -> None:
        """Have it made. From any thread."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._call()
            return
        if loop is not self._asked_in:
            self._asked_in = loop
            loop.call_soon(self._make)

    def _make(self) -> None:
        self._asked_in = None
        self._call()
