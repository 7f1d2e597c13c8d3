"""A thread that tells what changes in a folder, and goes on whatever happens to the folder."""

import atexit
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import watchfiles

GROUP_MS, STEP_MS, WAKE_MS, POLL_MS = 200, 50, 250, 200
"""Changes are taken together for so long at most; the wait for quiet; the wait for changes; between two polls."""

RETRY_S = 0.5
"""Between two attempts to watch a folder that is not there."""


class FolderWatcher:
    """Watches a folder, its sub-folders not.

    Args:
        folder: the folder; it may go away and come back, and be another one then.
        begin: called in the thread once the folder is watched, so that what changed before can be
            found; with True where it went away before, or became another one.
        follow: called several times a second with the names that changed, often with none.
        complain: called with one line when watching fails; the same line is not repeated.
        poll: compare again and again instead of asking the system for changes.
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
        self._poll = poll
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Between `start` and `close`."""
        return self._thread is not None

    @property
    def stopping(self) -> bool:
        """The thread should come to its end."""
        return self._stop.is_set()

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
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _watch(self, stop: threading.Event) -> None:
        complaint, again = "", False
        while not stop.is_set():
            try:
                for _ in self._rounds(stop, again):
                    complaint, again = "", True
            except Exception as error:
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                message = f"{self.folder} cannot be watched: {reason}"
                if message != complaint:
                    self._complain(message)
                # Also where it went away before it was watched: what is found next may be another folder.
                complaint, again = message, True
                stop.wait(RETRY_S)

    def _rounds(self, stop: threading.Event, again: bool) -> Iterator[None]:
        """Watch one folder until it is another one, or raise when it is gone; yields once, when it is watched."""
        identity = _identity(self.folder)
        rounds = watchfiles.watch(
            self.folder,
            watch_filter=None,
            debounce=GROUP_MS,
            step=STEP_MS,
            stop_event=stop,
            rust_timeout=WAKE_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
            force_polling=self._poll or None,
            poll_delay_ms=POLL_MS,
            recursive=False,
        )
        begun = False
        for changes in rounds:
            if not begun:
                # Only now: every change after it is told.
                self._begin(again)
                begun = True
                yield
            paths = {Path(path) for _, path in changes}
            self._follow({path.name for path in paths if path != self.folder})
            # The numbers of a folder that was deleted may be given to the next one at once.
            if (watchfiles.Change.deleted, str(self.folder)) in changes or _identity(self.folder) != identity:
                return


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
