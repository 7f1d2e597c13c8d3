"""What becomes of a request: a `Future` that costs little where nobody blocks for it."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from typing import Any, TypeVar

T = TypeVar("T")

LOG = logging.getLogger(__name__)


class Promise(Future[T]):
    """As `concurrent.futures.Future`, with a lock in the place of its condition, which takes longer to make and to use
    than all else here.

    Attributes:
        if_cancelled: called when it was cancelled, before those who were added.
    """

    def __init__(self) -> None:
        # All that `Future` makes, but for the condition: `wait` and `as_completed` take these, too.
        self._condition: Any = threading.Lock()
        self._state = PENDING
        self._result: Any = None
        self._exception: BaseException | None = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Callable[[Future[T]], object]] = []
        self.if_cancelled: Callable[[], object] | None = None

    def cancel(self) -> bool:
        """Cancel it, unless it runs or has ended."""
        with self._condition:
            if self._state in (RUNNING, FINISHED):
                return False
            if self._state != PENDING:
                return True
            self._state = CANCELLED
        if self.if_cancelled is not None:
            self.if_cancelled()
        self._tell()
        return True

    def result(self, timeout: float | None = None) -> T:
        """What it was given; waits for that.

        Raises:
            CancelledError: it was cancelled.
            TimeoutError: it did not come in time.
            BaseException: the error that it was given.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        found: T = self._result
        return found

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error that it was given, if it was one; waits as `result` does.

        Raises:
            CancelledError: it was cancelled.
            TimeoutError: it did not come in time.
        """
        if self._state != FINISHED:
            there = threading.Event()
            self.add_done_callback(lambda _: there.set())
            if not there.wait(timeout):
                raise TimeoutError
            if self._state in (CANCELLED, CANCELLED_AND_NOTIFIED):
                raise CancelledError
        return self._exception

    def set_result(self, result: T) -> None:
        """Give it its result.

        Raises:
            InvalidStateError: it is done.
        """
        self._end(result, None)

    def set_exception(self, exception: BaseException | None) -> None:
        """Give it an error.

        Raises:
            InvalidStateError: it is done.
        """
        self._end(None, exception)

    def _end(self, result: T | None, error: BaseException | None) -> None:
        with self._condition:
            if self._state not in (PENDING, RUNNING):
                raise InvalidStateError(f"it is done: {self._state}")
            self._result, self._exception, self._state = result, error, FINISHED
            for waiter in self._waiters:
                waiter.add_result(self) if error is None else waiter.add_exception(self)
        self._tell()

    def _tell(self) -> None:
        # Once it is done nobody is added. What was to be called holds the request, and whoever waits for it: kept, they
        # would be a cycle, and the collector's work.
        calls, self._done_callbacks, self.if_cancelled = self._done_callbacks, [], None
        for call in calls:
            try:
                call(self)
            except Exception:
                LOG.exception("a callback of a request failed")
