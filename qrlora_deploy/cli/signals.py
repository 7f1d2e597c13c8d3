"""SIGINT, SIGTERM and SIGHUP as one exception in the main thread, so that everything is cleaned up after each.

Without a handler the last two end the process at once, and what it was writing stays on the disk.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
"""What ends a process politely; Windows has no SIGHUP."""

PLAIN = (signal.SIG_DFL, signal.default_int_handler)
"""What is there where nobody has set a handler of their own."""

PATIENCE_S = 8.0
"""Native code may hold the main thread for minutes, and supervisors kill after ten seconds or more."""

LAST_WORDS_S = 1.0

OVER = b"\0"
"""Said to the watching thread at the end; no signal has this number."""

_watching = False
_heard: int | None = None
_pipe: tuple[int, ...] = ()
_before: dict[int, Any] = {}


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end. Everything that makes way for a KeyboardInterrupt makes way for it.

    Attributes:
        code: exit code, 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextmanager
def raised_signals(last_words: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Raise `Terminated` in the main thread at SIGINT, SIGTERM and SIGHUP; what was there before comes back.

    A second signal raises again. Where the main thread has not ended some seconds after one, because
    native code holds it or something swallowed the exception, temporary folders are removed, `last_words` is called
    and the process ends. Nothing happens in another thread, on which Python allows no handlers, nor for a signal that
    is ignored, as under nohup, or that has a handler already.
    """
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {number: there for number in numbers if (there := signal.getsignal(number)) in PLAIN}
    global _heard
    _heard = None
    _before.update(ours)
    try:
        for number in ours:
            signal.signal(number, _raise)
        with _watched(list(ours), last_words):
            yield
    finally:
        for number, there in ours.items():
            signal.signal(number, there)


def heard() -> int | None:
    """The number of the last signal that was raised as an exception; None: there was none, or not in this thread."""
    return _heard if threading.current_thread() is threading.main_thread() else None


def _raise(number: int, _frame: FrameType | None) -> None:
    global _heard
    _heard = number
    raise Terminated(number)


@contextmanager
def _watched(numbers: list[int], last_words: Callable[[], None]) -> Iterator[None]:
    """Let a thread hear of signals too: handlers wait until the main thread is in Python again."""
    if os.name == "nt":
        yield
        return
    listening, speaking = os.pipe()
    os.set_blocking(speaking, False)
    before = signal.set_wakeup_fd(speaking, warn_on_full_buffer=False)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(listening, numbers, over, last_words), name="signals", daemon=True)
    global _watching, _pipe
    _pipe = (listening, speaking)
    if not _watching:
        # A forked child has the handlers and the pipe, but not the thread; it must not speak for its parent.
        os.register_at_fork(after_in_child=_forget)
        _watching = True
    try:
        watcher.start()
        yield
    finally:
        over.set()
        with suppress(ValueError):
            signal.set_wakeup_fd(before)
        # Said and not only closed: a child that was forked meanwhile may hold the other end open.
        with suppress(BlockingIOError):
            os.write(speaking, OVER)
        os.close(speaking)
        # One whose start was cut short may still come to read it.
        if watcher.is_alive():
            watcher.join()
            os.close(listening)
        _pipe = ()


def _watch(listening: int, numbers: list[int], over: threading.Event, last_words: Callable[[], None]) -> None:
    from qrlora_deploy.io.temporary import remove_live

    while (said := os.read(listening, 1)) not in (b"", OVER):
        if said[0] in numbers and not over.wait(PATIENCE_S):
            remove_live()
            # Whatever holds the main thread may hold stderr too.
            speaker = threading.Thread(target=last_words, name="last-words", daemon=True)
            speaker.start()
            speaker.join(LAST_WORDS_S)
            os._exit(128 + said[0])


def _forget() -> None:
    global _pipe
    for end in _pipe:
        # A child that lives on must not keep its parent's pipe open.
        with suppress(OSError):
            os.close(end)
    _pipe = ()
    ours = [number for number in _before if signal.getsignal(number) is _raise]
    if ours:
        signal.set_wakeup_fd(-1)
    for number in ours:
        signal.signal(number, _before[number])
