"""Waiting for threads to the end, though signals ask the main thread to stop."""

import threading
import time
from collections.abc import Callable, Iterable

LOOK_S = 0.01


def finish(work: Callable[[], None], when_asked: Callable[[], None] = lambda: None) -> None:
    """Do `work` to its end in a thread of its own, however many signals come; the last one is raised then.

    A signal may come in the middle of `Thread.join`: Python up to 3.12 takes the thread for ended from then on, and
    ends the process in the middle of what it does. No signal interrupts another thread, so that one joins.

    Args:
        work: joins threads; it may be begun twice.
        when_asked: called at every signal, in the main thread.

    Raises:
        KeyboardInterrupt: a signal came. Whatever `work` raises, where none came.
    """
    asked: KeyboardInterrupt | None = None
    begun = threading.Event()
    outcome: list[BaseException | None] = []

    def run() -> None:
        begun.set()
        try:
            work()
        except BaseException as error:
            outcome.append(error)
        else:
            outcome.append(None)

    def wait() -> None:
        while not outcome:
            if not begun.is_set():
                # A start that was cut short may have started it all the same.
                threading.Thread(target=run, name="finish", daemon=True).start()
            time.sleep(LOOK_S)

    while not outcome:
        try:
            try:
                wait()
            except KeyboardInterrupt as error:
                asked = error
                when_asked()
                # Here already, and not by the loop: the next signal may be at the door.
                wait()
        except KeyboardInterrupt as error:
            asked = error
    if asked is not None:
        raise asked
    if outcome[0] is not None:
        raise outcome[0]


def join_all(threads: Iterable[threading.Thread]) -> None:
    """Wait for those that run; one whose start was cut short is not waited for."""
    for thread in threads:
        if thread.is_alive():
            thread.join()
