"""Attempts at something that may fail for a moment, and rest after it has failed for longer."""

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from qrlora_deploy.errors import NotReadyError, QrloraError, first_line

T = TypeVar("T")

NOT_AGAIN = (PermissionError, TimeoutError)
"""What a second attempt does not change, or would take too long for who waits."""

ATTEMPTS = 3
PAUSE_S = 0.1
"""Before the second attempt; twice as long before each further one."""

REST_S, LONGEST_REST_S = 0.5, 30.0
"""After all attempts have failed nothing is tried for so long, twice as long each time, and no longer than that."""


DOWN = 3
"""Objects that cannot be read, one after the other, for the store to be taken for down."""


class StoreDownError(NotReadyError):
    """A store of objects does not answer, or refuses to."""


class Patience:
    """Tries what a store is asked. Safe for many threads.

    The store is taken for down when it cannot be listed, or when `DOWN` different objects cannot be read and nothing is
    answered between. What would be asked then fails at once, so that no request waits for it in vain. One object that
    is slow, or that may not be read, says nothing of the others.

    Args:
        place: as messages call it.

    Attributes:
        up: it is not taken for down.
        failures: attempts that failed.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.up, self.failures = True, 0
        self._lock = threading.Lock()
        self._failing: set[str] = set()
        self._rests, self._rests_until_s = 0, 0.0

    def attempt(self, do: Callable[[], T], what: str = "") -> T:
        """Do it, again where that may help.

        Args:
            do: raises FileNotFoundError where there is no such thing, or a `QrloraError`: these are answers.
            what: the object that is asked for; empty: a listing, which is tried also while the store is taken for down.

        Raises:
            FileNotFoundError, QrloraError: as `do`.
            StoreDownError: every attempt failed, or would.
        """
        if what and time.monotonic() < self._rests_until_s:
            raise StoreDownError(f"{self.place} does not answer; it is tried again soon")
        for number in range(ATTEMPTS):
            try:
                result = do()
            except (FileNotFoundError, QrloraError):
                self._answered()
                raise
            except Exception as error:
                last = number + 1 == ATTEMPTS or isinstance(error, NOT_AGAIN)
                self._failed(what, last)
                if last:
                    raise StoreDownError(f"{self.place} does not answer: {first_line(error)}") from error
                time.sleep(PAUSE_S * 2**number * random.uniform(0.5, 1.5))
            else:
                self._answered()
                return result
        raise AssertionError("the last attempt ends")

    def missing(self) -> None:
        """The store answers, but the place is not there, or empty where it must not be: that is no better."""
        self._failed("", last=True)

    def _answered(self) -> None:
        with self._lock:
            self._failing.clear()
            self.up, self._rests, self._rests_until_s = True, 0, 0.0

    def _failed(self, what: str, last: bool) -> None:
        with self._lock:
            self.failures += 1
            if last and len(self._failing) < DOWN:
                self._failing.add(what)
            if last and (not what or len(self._failing) >= DOWN):
                self.up = False
                rest_s = min(LONGEST_REST_S, REST_S * 2**self._rests) * random.uniform(0.5, 1.0)
                self._rests, self._rests_until_s = min(self._rests + 1, 16), time.monotonic() + rest_s
