"""One thread at a time, in the order in which they came."""

import threading
import time
from collections import deque


class Turns:
    """A lock that is handed to whoever waits longest: with one of the standard library a busy thread keeps it.

    Use it as a context manager. Safe for many threads.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._busy = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._busy:
                self._busy = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        # Whose turn it is releases it.
        mine.acquire()

    def __exit__(self, *exception: object) -> None:
        with self._guard:
            following = self._waiting.popleft() if self._waiting else None
            self._busy = following is not None
        if following is not None:
            following.release()
            # Let it begin at once: otherwise it waits for the interpreter until this thread waits for something.
            time.sleep(0)
