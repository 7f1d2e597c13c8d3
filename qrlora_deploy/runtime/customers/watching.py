"""A thread that tells what changes in a folder, and goes on whatever happens to the folder."""

import atexit
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import watchfiles

from qrlora_deploy.runtime.customers.polling import FolderPoller

GROUP_MS, STEP_MS, WAKE_MS = 200, 50, 250
"""Changes are taken together for so long at most; the wait for quiet; the wait for changes."""

POLL_S, POLL_SHARE = 0.2, 1 / 3
"""From one comparison of a folder to the next, and the share of the time that they take in a large folder."""

RETRY_S = 0.5
"""Between two attempts to watch a folder that is not there."""

POLL_VARIABLE = "WATCHFILES_FORCE_POLLING"
"""The variable of the environment by which watchfiles is told to poll. Its own poller compares only whether
a time grew, and gives up at a link that leads in a circle; so it is never used."""


class FolderWatcher:
    """Watches a folder, its sub-folders not.

    Args:
        folder: the folder; it may go away and come back, and be another one then.
        begin: called in the thread once the folder is watched, so that what changed before can be
            found; with True where it went away before, or became another one.
        follow: called in the thread with the names that changed, sometimes with none.
        complain: called with one line when watching fails; the same line is not repeated.
        poll: compare again and again instead of asking the system for changes. So it is done, too,
            from the time on when the system refuses to tell them.

    Attributes:
        polls: files are compared.
        rests: not set while they are. Work that can wait then waits: thousands of short calls of the
            system would each wait for the interpreter's lock.
    """

    def __init__(
        self,
        folder: Path,
        begin: Callable[[bool], None],
        follow: Callable[[set[str]], None],
        complain: Callable[[str], None],
        poll: bool = False,
    ) -> None:
        self.folder = folder
        self._begin, self._follow, self._complain = begin, follow, complain
        self.polls = poll or _must_poll()
        self._thread: threading.Thread | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the thread: it does not live in a process that was forked."""
        if self._thread is not None:
            atexit.unregister(self.close)
        self._thread = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.rests = threading.Event()
        self.rests.set()

    @property
    def running(self) -> bool:
        """Between `start` and `close`."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread; nothing where it runs already."""
        with self._lock:
            if self._thread is not None:
                return
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, args=(self._stop,), name="folder-watcher", daemon=True)
            # The interpreter must not end in the middle of the watcher's native code.
            atexit.register(self.close)
            self._thread.start()

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._stop.set()
            atexit.unregister(self.close)
        # Not one whose start was cut short: there is nothing to wait for.
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join()

    def _watch(self, stop: threading.Event) -> None:
        complaint, again = "", False
        while not stop.is_set():
            polled = self.polls
            try:
                for _ in self._rounds(stop, again):
                    complaint = ""
                # It went away or is another one; or this is the end.
                again = True
            except Exception as error:
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                message = f"{self.folder} cannot be watched: {reason}"
                if self.polls != polled:
                    message += "; its files are compared instead"
                if message != complaint:
                    self._complain(message)
                # Also where it went away before it was watched: what is found next may be another folder.
                complaint, again = message, True
                stop.wait(RETRY_S)

    def _rounds(self, stop: threading.Event, again: bool) -> Iterator[None]:
        """Watch one folder until it is another one, or raise when it is gone; yields once, when it is watched."""
        identity = _identity(self.folder)
        begun = False
        for names, gone in self._polled(stop, identity) if self.polls else self._told(stop, identity):
            if gone:
                return
            if not begun:
                # Only now: every change after it is told.
                self._begin(again)
                begun = True
                yield
            self._follow(names)

    def _told(self, stop: threading.Event, identity: tuple[int, int]) -> Iterator[tuple[set[str], bool]]:
        """What the system tells: names that changed, and whether the folder is not the one of `identity` any more."""
        try:
            for changes in self._native(stop):
                paths = {Path(path) for _, path in changes}
                # The numbers of a folder that was deleted may be given to the next one at once.
                deleted = (watchfiles.Change.deleted, str(self.folder)) in changes
                if deleted or _identity(self.folder) != identity:
                    # What went with the whole folder was not deleted.
                    yield set(), True
                    return
                yield {path.name for path in paths if path != self.folder}, False
        except FileNotFoundError:
            raise
        except Exception:
            # As where the system has no more watches to give.
            self.polls = self.folder.is_dir()
            raise

    def _native(self, stop: threading.Event) -> Iterator[set[tuple[watchfiles.Change, str]]]:
        return watchfiles.watch(
            self.folder,
            watch_filter=None,
            debounce=GROUP_MS,
            step=STEP_MS,
            stop_event=stop,
            rust_timeout=WAKE_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
            force_polling=False,
            recursive=False,
        )

    def _polled(self, stop: threading.Event, identity: tuple[int, int]) -> Iterator[tuple[set[str], bool]]:
        """What a comparison finds, as `_told`."""
        poller = FolderPoller(self.folder)
        yield set(), False
        due = time.monotonic() + POLL_S
        while not stop.wait(max(0.0, due - time.monotonic())):
            # A large folder takes longer than that, and is begun again at once.
            due = time.monotonic() + POLL_S
            for names in self._steps(poller, stop):
                if _identity(self.folder) != identity:
                    yield set(), True
                    return
                yield names, False

    def _steps(self, poller: FolderPoller, stop: threading.Event) -> Iterator[set[str]]:
        """The steps of a comparison, each after a rest from the one before."""
        steps, pause = poller.steps(), 0.0
        while not stop.wait(pause):
            begin = time.monotonic()
            self.rests.clear()
            try:
                names = next(steps, None)
            finally:
                self.rests.set()
            if names is None:
                return
            pause = (time.monotonic() - begin) * (1 / POLL_SHARE - 1)
            yield names


def _must_poll() -> bool:
    """As watchfiles decides: the environment says so, or this is Linux in Windows, whose folders tell nothing."""
    asked = os.environ.get(POLL_VARIABLE)
    if asked:
        return asked.lower() not in ("false", "disable", "disabled")
    return "microsoft-standard" in platform.uname().release


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
