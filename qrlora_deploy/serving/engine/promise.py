"""What becomes of a request: a `Future` that costs little where nobody blocks for it."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any, TypeVar

T = TypeVar("T")

LOG = logging.getLogger(__name__)

WAITING, RUNNING, CANCELLED, ENDED = range(4)


class Promise(Future[T]):
    """As `concurrent.futures.Future`, without its condition, which takes longer to make and to use than all else
    here. For a request it is a fifth of the time.

    Attributes:
        if_cancelled: called when it was cancelled, before those who were added.
    """

    def __init__(self) -> None:
        # Not `Future`'s own: nothing that it makes is used here.
        self._guard = threading.Lock()
        self._at, self._found, self._error = WAITING, None, None
        self._calls: list[Callable[[Future[T]], object]] = []
        self.if_cancelled: Callable[[], None] | None = None

    def cancel(self) -> bool:
        """Cancel it, unless it runs or has ended."""
        with self._guard:
            if self._at in (RUNNING, ENDED):
                return False
            was, self._at = self._at, CANCELLED
        if was == WAITING:
            if self.if_cancelled is not None:
                self.if_cancelled()
            self._tell()
        return True

    def cancelled(self) -> bool:
        """Whether it was."""
        return self._at == CANCELLED

    def running(self) -> bool:
        """Whether it cannot be cancelled any more and has not ended."""
        return self._at == RUNNING

    def done(self) -> bool:
        """Whether it has ended, or was cancelled."""
        return self._at >= CANCELLED

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call `fn` with it when it is done; at once where it is."""
        with self._guard:
            if self._at < CANCELLED:
                self._calls.append(fn)
                return
        fn(self)

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
        found: Any = self._found
        return found  # type: ignore[no-any-return]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error that it was given, if it was one; waits as `result` does.

        Raises:
            CancelledError: it was cancelled.
            TimeoutError: it did not come in time.
        """
        if self._at < CANCELLED:
            there = threading.Event()
            self.add_done_callback(lambda _: there.set())
            if not there.wait(timeout):
                raise TimeoutError
        if self._at == CANCELLED:
            raise CancelledError
        return self._error

    def set_running_or_notify_cancel(self) -> bool:
        """From now on it cannot be cancelled; False: it was."""
        with self._guard:
            if self._at == WAITING:
                self._at = RUNNING
            return self._at == RUNNING

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

    def _end(self, found: T | None, error: BaseException | None) -> None:
        with self._guard:
            if self._at >= CANCELLED:
                raise InvalidStateError("it is done")
            self._found, self._error, self._at = found, error, ENDED
        self._tell()

    def _tell(self) -> None:
        # Nobody adds one any more.
        calls, self._calls = self._calls, []
        for call in calls:
            try:
                call(self)
            except Exception:
                LOG.exception("a callback of a request failed")
