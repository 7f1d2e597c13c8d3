"""SIGTERM and SIGHUP as exceptions in the main thread, so that everything is cleaned up as after Ctrl-C.

Without a handler they end the process at once, and what it was writing stays on the disk.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

NAMES = ("SIGTERM", "SIGHUP")
"""What ends a process politely; Windows knows only the first."""

PATIENCE_S = 8.0
"""Native code may hold the main thread for minutes, and supervisors kill after ten seconds or more."""

OVER = b"\0"
"""Said to the watching thread at the end; no signal has this number."""

_watching = False
_heard: int | None = None
_pipe: tuple[int, ...] = ()


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end. Everything that makes way for Ctrl-C makes way for it.

    Attributes:
        code: exit code, 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextmanager
def raised_signals() -> Iterator[None]:
    """Raise `Terminated` in the main thread at SIGTERM and SIGHUP; what was there before comes back.

    A second signal raises again. Where the main thread has not ended some seconds after one, because
    native code holds it or something swallowed the exception, temporary folders are removed and the process ends.
    Nothing happens in another thread, on which Python allows no handlers, nor for a signal that is
    ignored, as under nohup, or that has a handler already.
    """
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    global _heard
    _heard = None
    try:
        for number in ours:
            signal.signal(number, _raise)
        with _watched(ours):
            yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def heard() -> int | None:
    """The number of the last signal that was raised as an exception; None: there was none."""
    return _heard


def _raise(number: int, _frame: FrameType | None) -> None:
    global _heard
    _heard = number
    raise Terminated(number)


@contextmanager
def _watched(numbers: list[int]) -> Iterator[None]:
    """Let a thread hear of signals too: handlers wait until the main thread is in Python again."""
    if os.name == "nt":
        yield
        return
    listening, speaking = os.pipe()
    os.set_blocking(speaking, False)
    before = signal.set_wakeup_fd(speaking, warn_on_full_buffer=False)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(listening, numbers, over), name="signals", daemon=True)
    watcher.start()
    global _watching, _pipe
    _pipe = (listening, speaking)
    if not _watching:
        # A forked child has the handlers and the pipe, but not the thread; it must not speak for its parent.
        os.register_at_fork(after_in_child=_forget)
        _watching = True
    try:
        yield
    finally:
        over.set()
        with suppress(ValueError):
            signal.set_wakeup_fd(before)
        # Said and not only closed: a child that was forked meanwhile may hold the other end open.
        with suppress(BlockingIOError):
            os.write(speaking, OVER)
        os.close(speaking)
        watcher.join()
        os.close(listening)
        _pipe = ()


def _watch(listening: int, numbers: list[int], over: threading.Event) -> None:
    from qrlora_deploy.io.temporary import remove_live

    while (said := os.read(listening, 1)) not in (b"", OVER):
        if said[0] in numbers and not over.wait(PATIENCE_S):
            remove_live()
            os._exit(128 + said[0])


def _forget() -> None:
    global _pipe
    for end in _pipe:
        # A child that lives on must not keep its parent's pipe open.
        with suppress(OSError):
            os.close(end)
    _pipe = ()
    if signal.getsignal(signal.SIGTERM) is _raise:
        signal.set_wakeup_fd(-1)
    for name in NAMES:
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is _raise:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
