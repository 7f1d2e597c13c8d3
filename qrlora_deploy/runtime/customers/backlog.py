"""Names that somebody has to look at, in a thread of its own: what changed last comes first."""

import atexit
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

IDLE_S = 0.25
"""Between two calls of `idle`."""

BURST_S, COMPARE_SHARE = 0.02, 0.5
"""What is only compared takes this share of a core, in bursts of so many seconds: there may be very much of it."""


class Backlog:
    """A thread that looks at names, one after the other.

    However much there is to read, a name that changed just now is the next one. What is only to be
    compared comes when nothing has changed, and is listed no earlier than that.

    Args:
        look: called in the thread with a name that changed; it never raises.
        compare: called with a name of those to compare, unless it is empty; it never raises.
        idle: called a few times a second; gives names to look at when nothing else has changed.
        complain: called with one line when the names to compare cannot be listed.
    """

    def __init__(
        self,
        look: Callable[[str], None],
        compare: Callable[[str], None],
        idle: Callable[[], Iterable[str]],
        complain: Callable[[str], None],
    ) -> None:
        self._look, self._compare, self._idle, self._complain = look, compare, idle, complain
        self._thread: threading.Thread | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything, the thread too: it does not live in a process that was forked."""
        was_running, self._thread = self._thread is not None, None
        self._changed: OrderedDict[str, None] = OrderedDict()
        self._later: Iterator[str] | None = None
        self._wake = threading.Condition()
        self._stop = threading.Event()
        if was_running:
            atexit.unregister(self.close)

    def start(self) -> None:
        """Start the thread."""
        if self._thread is None:
            self.reset()
            self._thread = threading.Thread(target=self._run, args=(self._stop,), name="folder-reader", daemon=True)
            atexit.register(self.close)
            self._thread.start()

    def close(self) -> None:
        """Stop the thread and wait for its end; what is left is forgotten."""
        thread, self._thread = self._thread, None
        self._stop.set()
        with self._wake:
            self._wake.notify_all()
        atexit.unregister(self.close)
        # Not one whose start was cut short: there is nothing to wait for.
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join()

    def add(self, names: Iterable[str], first: bool = True) -> None:
        """Look at these names: before everything else, or after all that changed."""
        with self._wake:
            for name in names:
                if first or name not in self._changed:
                    self._changed[name] = None
                    self._changed.move_to_end(name, last=first)
            self._wake.notify_all()

    def compare_later(self, names: Iterator[str]) -> None:
        """Compare these names, in place of those that are left of an earlier call."""
        with self._wake:
            self._later = names
            self._wake.notify_all()

    def _run(self, stop: threading.Event) -> None:
        looked, spent = time.monotonic(), 0.0
        while not stop.is_set():
            with self._wake:
                if not self._changed and self._later is None and not stop.is_set():
                    self._wake.wait(IDLE_S)
                name = self._changed.popitem()[0] if self._changed else None
            if name is not None:
                self._look(name)
            elif (names := self._later) is not None:
                begin = time.thread_time()
                self._compare_next(names)
                spent += time.thread_time() - begin
                if spent >= BURST_S:
                    self._rest(spent * (1 / COMPARE_SHARE - 1), stop)
                    spent = 0.0
            if time.monotonic() - looked >= IDLE_S:
                self.add(self._idle(), first=False)
                looked = time.monotonic()

    def _rest(self, seconds: float, stop: threading.Event) -> None:
        """Wait, at most until a name is added."""
        with self._wake:
            if not self._changed and not stop.is_set():
                self._wake.wait(seconds)

    def _compare_next(self, names: Iterator[str]) -> None:
        try:
            name = next(names, None)
        except Exception as error:
            self._complain(f"{error}")
            name = None
        if name:
            self._compare(name)
        if name is not None:
            return
        with self._wake:
            if self._later is names:
                self._later = None
